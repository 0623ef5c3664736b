"""Which labels or prompts calibrate: their own, or the first of those that are evaluated as in the released code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from edadm.errors import EdadmError
from edadm.sampling.guidance import Condition, Conditions
from edadm.sampling.noise import CALIBRATION, EVALUATION

RELEASED = "released"
CONDITIONS = ("disjoint", RELEASED)


@dataclass(frozen=True)
class FirstOfEvaluation:
    """Conditions whose calibration rows are those of the evaluated images with the same numbers (methods.md 1)."""

    own: Conditions
    evaluation_seed: int

    @property
    def null(self) -> Condition | None:
        """The null condition."""
        return self.own.null

    def rows(self, stream: str, seed: int, numbers: Sequence[int]) -> Condition:
        """Return the conditions of these image numbers."""
        return self.own.rows(*self._of(stream, seed), numbers)

    def prompts(self, stream: str, seed: int, numbers: Sequence[int]) -> list[str]:
        """Return the prompts of these image numbers, where the conditions are made from prompts."""
        own: Any = self.own
        return own.prompts(*self._of(stream, seed), numbers)

    def _of(self, stream: str, seed: int) -> tuple[str, int]:
        return (EVALUATION, self.evaluation_seed) if stream == CALIBRATION else (stream, seed)

    def identity(self, stream: str) -> dict[str, Any]:
        """Return what tells the conditions of a stream from others; those of other streams are the own ones."""
        if stream != CALIBRATION:
            return self.own.identity(stream)
        return self.own.identity(EVALUATION) | {"calibration": "released", "evaluation_seed": self.evaluation_seed}


def as_released(own: Conditions, choice: str, evaluation_seed: int) -> Conditions:
    """Return conditions whose calibration rows follow the choice, one of CONDITIONS.

    disjoint: their own order of labels, their own prompts. released: those of the first evaluated images, as the
    released code has them. Raises EdadmError for another choice.
    """
    if choice not in CONDITIONS:
        raise EdadmError(f"task.calibration_conditions={choice}: choose {' or '.join(CONDITIONS)}")
    return own if choice == "disjoint" else FirstOfEvaluation(own, evaluation_seed)

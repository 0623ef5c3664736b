"""TSC, the timestep-aware calibration of Q-Diffusion: the same trajectories at evenly spaced steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from edadm.calibration.rows import CalibrationSet, step_counts, take
from edadm.calibration.trajectories import Trajectories
from edadm.errors import EdadmError


@dataclass(frozen=True)
class Uniform:
    """Rows at every (T // steps)-th network call, all T calls when there are no more than ``steps``.

    When ``steps`` does not divide T, more than ``steps`` calls contribute (T 50, steps 20: 25), as in the official
    `utils.get_train_samples`. n rows that do not divide evenly: one more for the earliest calls.
    Deviation: the official rows lie step by step, here they are shuffled as those of every other method, since running
    ranges depend on the order of the batches.
    """

    steps: int = 20
    version: int = 1
    needs_features: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or self.steps < 1:
            raise EdadmError(f"TSC cannot take rows at {self.steps} steps: choose a whole number of at least 1")

    def chosen(self, steps: int) -> range:
        """Return the network calls, out of ``steps``, that give rows."""
        return range(0, steps, max(steps // self.steps, 1))

    def trajectories_needed(self, n: int, steps: int) -> int:
        """Return the rows at the first chosen call: every call takes the same first trajectories."""
        return -(-n // len(self.chosen(steps)))

    def select(
        self, trajectories: Trajectories, n: int, rng: np.random.Generator
    ) -> tuple[CalibrationSet, dict[str, Any]]:
        """Return n rows and the number of rows per step. Raises EdadmError when there are too few trajectories."""
        calls = self.chosen(trajectories.steps)
        order = rng.permutation(n)
        rows, position = order // len(calls), order % len(calls)
        steps = np.asarray(calls)[position]
        return take(trajectories, steps, rows), {"counts": step_counts(steps, trajectories.steps)}

"""Random calibration: every row from a step drawn uniformly (the baseline of EDA-DM's Table VI)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from edadm.calibration.rows import CalibrationSet, step_counts, take
from edadm.calibration.trajectories import Trajectories


@dataclass(frozen=True)
class Random:
    """One row per trajectory, at a step drawn uniformly and independently."""

    version: int = 1
    needs_features: ClassVar[bool] = False

    def trajectories_needed(self, n: int, steps: int) -> int:
        """Return n."""
        return n

    def select(
        self, trajectories: Trajectories, n: int, rng: np.random.Generator
    ) -> tuple[CalibrationSet, dict[str, Any]]:
        """Return n rows and the number of rows per step. Raises EdadmError when there are too few trajectories."""
        steps = rng.integers(trajectories.steps, size=n)
        return take(trajectories, steps), {"counts": step_counts(steps, trajectories.steps)}

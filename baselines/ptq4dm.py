"""PTQ4DM: calibration rows from normally distributed timesteps (NDTC).

Paper: Shang et al., "Post-training Quantization on Diffusion Models", CVPR 2023.
Official code: github.com/42Shawn/PTQ4DM, `quant_image_sample.py: generate_t`, mode `normal`; its scripts pass mean 0.4,
std 0.4 (parser defaults 0.5, 0.35) and 1024 rows.

Deviations:
- The official code compares the drawn t with the loop counter k (0 the noisiest) and then hands the same number to the
  network as its timestep, so image and timestep belong to opposite ends of the trajectory. Here the row drawn at t is
  call k = T - 1 - t with the timestep of that call: the mean lies on the low-noise side, as intended.
- The paper speaks of a skew normal distribution; the code, and this file, clamp a plain normal one.
- Everything else of the pipeline (ranges, reconstruction) is the harness's own; as released it sets ranges only
  (`reconstruction=none`) and quantizes the outputs of layers, which no quantizer here does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from edadm.calibration.rows import CalibrationSet, step_counts, take
from edadm.calibration.trajectories import Trajectories
from edadm.errors import EdadmError


@dataclass(frozen=True)
class Normal:
    """One row per trajectory at t drawn from a clamped normal; mean and std are fractions of the number of steps."""

    mean: float = 0.4
    std: float = 0.4
    version: int = 1
    needs_features: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.std < 0:
            raise EdadmError(f"NDTC: the standard deviation is {self.std}, it must not be negative")

    def trajectories_needed(self, n: int, steps: int) -> int:
        """Return n."""
        return n

    def select(
        self, trajectories: Trajectories, n: int, rng: np.random.Generator
    ) -> tuple[CalibrationSet, dict[str, Any]]:
        """Return n rows and the number of rows per step. Raises EdadmError when there are too few trajectories."""
        total = trajectories.steps
        t = np.trunc(rng.normal(self.mean, self.std, n) * total).clip(0, total - 1).astype(np.int64)
        steps = total - 1 - t
        return take(trajectories, steps), {"counts": step_counts(steps, total)}

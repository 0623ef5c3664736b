"""The rows that calibrate a quantized network, and what every way of choosing them shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from edadm.calibration.files import read_tensors, write_tensors
from edadm.calibration.trajectories import Trajectories
from edadm.errors import EdadmError


@dataclass(frozen=True)
class CalibrationSet:
    """Network inputs of n rows.

    x: float32 (n, C, H, W), finite. timestep: int64 (n,), what the network is told. step: int64 (n,), the number k of
    the network call it comes from, 0 the noisiest. condition: (n, ...) or None.
    """

    x: Tensor
    timestep: Tensor
    step: Tensor
    condition: Tensor | None = None

    def __post_init__(self) -> None:
        n = len(self.x) if self.x.dim() else 0
        if self.x.dim() < 2 or not n or not self.x.is_floating_point():
            raise EdadmError(f"calibration set: x is {_describe(self.x)}, expected floats of shape (rows, C, H, W)")
        for name, tensor in (("timestep", self.timestep), ("step", self.step)):
            if tensor.shape != (n,) or tensor.is_floating_point() or tensor.min() < 0:
                raise EdadmError(f"calibration set: {name} is {_describe(tensor)}, expected {n} integers >= 0")
        if self.condition is not None and (not self.condition.dim() or len(self.condition) != n):
            raise EdadmError(f"calibration set: condition is {_describe(self.condition)}, expected {n} rows")
        if not torch.isfinite(self.x).all():
            raise EdadmError("calibration set: x holds NaN or Inf; sample the trajectories again in float32")

    def __len__(self) -> int:
        return len(self.x)

    def save(self, path: Path, metadata: Mapping[str, object]) -> Path:
        """Write to a safetensors file and return its path.

        metadata: where the rows come from (task, sampler, seed, method), kept as text.
        """
        tensors = {"x": self.x, "timestep": self.timestep, "step": self.step, "condition": self.condition}
        return write_tensors(path, tensors, metadata)

    @classmethod
    def load(
        cls, path: Path, *, min_rows: int = 1, shape: tuple[int, ...] | None = None
    ) -> tuple[CalibrationSet, dict[str, str]]:
        """Return (set, metadata) of a file that `save` wrote.

        shape: (C, H, W) that the network expects. All rows are returned, never a part of them: their order may follow
        the steps. Raises EdadmError when the file is absent or broken, when tensors are missing, mis-shaped or not
        finite, or when there are fewer than min_rows rows.
        """
        tensors, metadata = read_tensors(path, "calibration set", ("x", "timestep", "step"), ("condition",))
        try:
            rows = cls(tensors["x"].float(), tensors["timestep"], tensors["step"], tensors.get("condition"))
        except EdadmError as error:
            raise EdadmError(f"{path}: {error}") from error
        if shape is not None and tuple(rows.x.shape[1:]) != tuple(shape):
            raise EdadmError(
                f"{path} holds rows of shape {tuple(rows.x.shape[1:])}, the network expects {tuple(shape)}: "
                "use a set made for this task"
            )
        if len(rows) < min_rows:
            raise EdadmError(
                f"{path} holds {len(rows)} rows, {min_rows} are needed: lower the rows of the profile or save a "
                "larger set"
            )
        return rows, metadata


class RowSampler(Protocol):
    """How rows are chosen from full-precision trajectories: the `calibration` slot of a method."""

    version: int
    needs_features: ClassVar[bool]

    def trajectories_needed(self, n: int, steps: int) -> int:
        """Return how many trajectories of ``steps`` network calls n rows need."""

    def select(
        self, trajectories: Trajectories, n: int, rng: np.random.Generator
    ) -> tuple[CalibrationSet, dict[str, Any]]:
        """Return n rows and JSON-like diagnostics, which hold at least ``counts``: rows per step."""


def take(trajectories: Trajectories, steps: np.ndarray, rows: np.ndarray | None = None) -> CalibrationSet:
    """Take one row per entry of ``steps``: x of trajectory ``rows[j]`` (default j) at network call ``steps[j]``.

    Raises EdadmError when there are fewer trajectories than that.
    """
    rows = np.arange(len(steps)) if rows is None else rows
    needed = int(rows.max(initial=-1)) + 1
    if not needed:
        raise EdadmError("a calibration set of 0 rows was asked for: choose at least 1")
    if needed > trajectories.count:
        raise EdadmError(
            f"{trajectories.count} stored trajectories are too few: {len(steps)} calibration rows need {needed}. "
            "Sample more trajectories or ask for fewer rows"
        )
    k = torch.from_numpy(np.asarray(steps, dtype=np.int64))
    x = trajectories.x[k, torch.from_numpy(np.asarray(rows, dtype=np.int64))]
    return CalibrationSet(x, trajectories.timesteps[k], k)


def step_counts(steps: np.ndarray, total: int) -> list[int]:
    """Return how many rows each of the ``total`` network calls gives."""
    return np.bincount(steps, minlength=total).tolist()


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"

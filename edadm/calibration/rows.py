"""The rows that calibrate a quantized network, and what every way of choosing them shares."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from edadm.calibration.files import named, read_tensors, under, write_tensors
from edadm.calibration.trajectories import Trajectories
from edadm.errors import EdadmError
from edadm.sampling.guidance import Condition, doubled, require_same_rows


@dataclass(frozen=True)
class CalibrationSet:
    """Network inputs of n rows.

    x: float32 (n, C, H, W), finite. timestep: (n,), what the network is told, int64, or float64 of a sampler with
    fractional times: never an index. step: int64 (n,), the number k of the sampling step it comes from, 0 the noisiest.
    condition: (n, ...) by the names the network takes them, or None. null: under guidance the null condition, one row.
    """

    x: Tensor
    timestep: Tensor
    step: Tensor
    condition: Condition | None = None
    null: Condition | None = None

    def __post_init__(self) -> None:
        n = len(self.x) if self.x.dim() else 0
        if self.x.dim() < 2 or not n or not self.x.is_floating_point():
            raise EdadmError(f"calibration set: x is {_describe(self.x)}, expected floats of shape (rows, C, H, W)")
        if self.timestep.shape != (n,) or not (self.timestep >= 0).all() or not torch.isfinite(self.timestep).all():
            raise EdadmError(f"calibration set: timestep is {_describe(self.timestep)}, expected {n} numbers >= 0")
        if self.step.shape != (n,) or self.step.is_floating_point() or self.step.min() < 0:
            raise EdadmError(f"calibration set: step is {_describe(self.step)}, expected {n} integers >= 0")
        for name, rows in (self.condition or {}).items():
            if not rows.dim() or len(rows) != n:
                raise EdadmError(f"calibration set: condition {name} is {_describe(rows)}, expected {n} rows")
        if self.null is not None:
            require_same_rows(self.condition or {}, self.null)
        if not torch.isfinite(self.x).all():
            raise EdadmError("calibration set: x holds NaN or Inf; sample the trajectories again in float32")

    def inputs(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return what the network is called with: x, timestep and the condition by name.

        Under guidance every row comes twice in a row, with the null condition and with its own, so that any part of an
        even number of rows holds both in equal number: the released code doubles batch by batch (methods.md 1).
        """
        condition = dict(self.condition or {})
        if self.null is None:
            return self.x, self.timestep, condition
        both = doubled(condition, self.null)
        pairs = torch.arange(2 * len(self)).view(2, -1).T.flatten()
        return (
            self.x.repeat_interleave(2, dim=0),
            self.timestep.repeat_interleave(2),
            {name: rows[pairs] for name, rows in both.items()},
        )

    def __len__(self) -> int:
        return len(self.x)

    def save(self, path: Path, metadata: Mapping[str, object]) -> Path:
        """Write to a safetensors file and return its path.

        metadata: where the rows come from (task, sampler, seed, method), kept as text.
        """
        tensors = {"x": self.x, "timestep": self.timestep, "step": self.step}
        return write_tensors(path, tensors | named("condition", self.condition) | named("null", self.null), metadata)

    @classmethod
    def load(
        cls, path: Path, *, min_rows: int = 1, shape: tuple[int, ...] | None = None
    ) -> tuple[CalibrationSet, dict[str, str]]:
        """Return (set, metadata) of a file that `save` wrote.

        shape: (C, H, W) that the network expects. All rows are returned, never a part of them: their order may follow
        the steps. Raises EdadmError when the file is absent or broken, when tensors are missing, mis-shaped or not
        finite, or when there are fewer than min_rows rows.
        """
        tensors, metadata = read_tensors(
            path, "calibration set", ("x", "timestep", "step"), prefixes=("condition", "null")
        )
        conditions = under("condition", tensors), under("null", tensors)
        try:
            rows = cls(tensors["x"].float(), tensors["timestep"], tensors["step"], *conditions)
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
    """Take one row per entry of ``steps``: x of trajectory ``rows[j]`` (default j) at sampling step ``steps[j]``.

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
    j = torch.from_numpy(np.asarray(rows, dtype=np.int64))
    condition = trajectories.condition and {name: tensor[j] for name, tensor in trajectories.condition.items()}
    return CalibrationSet(trajectories.x[k, j], trajectories.timesteps[k], k, condition, trajectories.null)


def step_counts(steps: np.ndarray, total: int) -> list[int]:
    """Return how many rows each of the ``total`` sampling steps gives."""
    return np.bincount(steps, minlength=total).tolist()


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"

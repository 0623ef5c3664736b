"""Full-precision sampling trajectories, shared by every calibration method, bit-width and seed of the optimisation."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edadm.calibration.files import named, read_tensors, under, write_tensors
from edadm.errors import EdadmError
from edadm.sampling.generate import Progress, sampler_noise
from edadm.sampling.guidance import Condition, Guidance, denoise_for
from edadm.sampling.interface import Denoise, DiffusionSampler, unwrap
from edadm.sampling.noise import CALIBRATION, noise


@dataclass(frozen=True)
class Trajectories:
    """What the full-precision network saw while it sampled N images in T steps.

    x: float32 (T, N, C, H, W), network input of step k; x[0] is noise. timesteps: (T,), largest first, int64, or
    float64 of a sampler with fractional times. features: float32 (T, B, C', ...) of the first trajectories, or None;
    B <= N, or 2N under guidance. condition: of every trajectory (N, ...), by the names the network takes them, or None.
    null: under guidance the null condition, one row.
    """

    x: Tensor
    timesteps: Tensor
    features: Tensor | None = None
    condition: Condition | None = None
    null: Condition | None = None

    def __post_init__(self) -> None:
        steps = len(self.timesteps)
        if self.x.dim() < 3 or len(self.x) != steps or self.timesteps.shape != (steps,):
            raise EdadmError(
                f"trajectories of shape {tuple(self.x.shape)} do not fit {steps} timesteps: make them again"
            )
        most = self.count * (1 if self.null is None else 2)
        if self.features is not None and (
            self.features.dim() < 3 or len(self.features) != steps or self.features.shape[1] > most
        ):
            raise EdadmError(
                f"features of shape {tuple(self.features.shape)} do not belong to {steps} steps of {self.count} "
                "trajectories: make them again"
            )
        for name, rows in (self.condition or {}).items():
            if len(rows) != self.count:
                raise EdadmError(f"{len(rows)} rows of {name} do not fit {self.count} trajectories: make them again")

    @property
    def steps(self) -> int:
        """Number of sampling steps T, which is that of the network calls unless a step makes several."""
        return len(self.timesteps)

    @property
    def count(self) -> int:
        """Number of trajectories N."""
        return self.x.shape[1]

    def save(self, path: Path, metadata: Mapping[str, object] | None = None) -> Path:
        """Write to a safetensors file with metadata as text, and return its path."""
        tensors = {"x": self.x, "timesteps": self.timesteps, "features": self.features}
        conditions = named("condition", self.condition) | named("null", self.null)
        return write_tensors(path, tensors | conditions, metadata or {})

    @classmethod
    def load(cls, path: Path) -> Trajectories:
        """Read what `save` wrote. Raises EdadmError when the file is absent, broken or no such file."""
        tensors, _ = read_tensors(path, "trajectories file", ("x", "timesteps"), ("features",), ("condition", "null"))
        conditions = under("condition", tensors), under("null", tensors)
        return cls(tensors["x"], tensors["timesteps"], tensors.get("features"), *conditions)


def collect(
    denoise: Callable[..., Any],
    sampler: DiffusionSampler,
    n: int,
    *,
    shape: Sequence[int],
    seed: int,
    batch: int = 64,
    guidance: Guidance | None = None,
    feature_module: str | None = None,
    feature_batches: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Trajectories:
    """Sample n trajectories in float32 and keep the network input of every step.

    denoise: the full-precision network, an nn.Module when features are wanted, called as by `generate`.
    shape: (C, H, W) of one sample. Batches are aligned to trajectory numbers and the last one is filled up, so a
    trajectory depends on (seed, its number, batch) only. feature_module: name of the submodule whose *output* is the
    TDAC feature: the released code's "input of the middle attention" is the output of ``mid_block.resnets.0``, the
    paper's feature the output of ``mid_block``. feature_batches: keep the features of that many first batches (released
    code for latent diffusion: 1), default all. Under guidance a batch has two features per trajectory, those of the
    null condition first. Where a step makes several network calls (the first of PLMS), the input is that of its first
    call and the feature that of its last, as in the released code.
    Raises Diverged when NaN or Inf appears, EdadmError for an unknown module.
    """
    if n < 1 or batch < 1:
        raise ValueError(f"cannot sample {n} trajectories in batches of {batch}")
    visited = step_times(sampler)
    kept = with_features(n, batch, feature_batches)
    made = _Made(torch.empty(len(visited), n, *shape), kept, batch)
    for start in range(0, n, batch):
        numbers = range(start, start + batch)
        bound = denoise_for(denoise, guidance, CALIBRATION, seed, numbers, device)
        with _captured(denoise, feature_module if start < kept else None) as feature:
            _follow(bound, sampler, numbers, shape, seed, device, feature, made)
        if progress is not None:
            progress(min(start + batch, n), n)
    return Trajectories(
        made.x,
        visited,
        made.features,
        None if guidance is None else guidance.conditions.rows(CALIBRATION, seed, range(n)),
        None if guidance is None else guidance.null,
    )


def with_features(n: int, batch: int, feature_batches: int | None) -> int:
    """Return of how many of the first n trajectories `collect` keeps features."""
    return n if feature_batches is None else min(n, feature_batches * batch)


@dataclass
class _Made:
    """Where every input and feature is written as it comes, so that none is held twice.

    x: of all trajectories. kept: number of trajectories with features. features: made as the first one shows its shape.
    """

    x: Tensor
    kept: int
    batch: int
    features: Tensor | None = None

    def write_input(self, step: int, start: int, x: Tensor) -> None:
        """Keep the input of one batch, whose first trajectory is ``start``, without the rows that fill it up."""
        rows = self.x[step, start : start + self.batch]
        rows.copy_(x[: len(rows)])

    def write_feature(self, step: int, start: int, feature: Tensor) -> None:
        """Keep the feature of one batch, which has two rows a trajectory under guidance."""
        copies, count = len(feature) // self.batch, min(self.batch, self.kept - start)
        if self.features is None:
            self.features = torch.empty(len(self.x), copies * self.kept, *feature.shape[1:])
        rows = feature.unflatten(0, (-1, self.batch))[:, :count].flatten(0, 1)
        self.features[step, copies * start : copies * (start + count)] = rows


def step_times(sampler: DiffusionSampler) -> Tensor:
    """Return the time of every step's first network call, int64 (T,), or float64 where times are fractional."""
    first: dict[int, float] = {}
    for step, t in zip(sampler.step_of_call, sampler.timesteps, strict=True):
        first.setdefault(step, t)
    ordered = list(first.values())
    return torch.tensor(ordered, dtype=torch.int64 if all(isinstance(t, int) for t in ordered) else torch.float64)


def _follow(
    denoise: Denoise,
    sampler: DiffusionSampler,
    numbers: Sequence[int],
    shape: Sequence[int],
    seed: int,
    device: torch.device | str,
    feature: Callable[[], Tensor] | None,
    made: _Made,
) -> None:
    """Sample one batch and keep the network input and the feature (none without a source of it) of every step."""
    steps = sampler.step_of_call

    def record(k: int, t: float, x: Tensor, eps: Tensor) -> None:
        if steps[k] not in steps[:k]:
            made.write_input(steps[k], numbers[0], x)
        if feature is not None:
            made.write_feature(steps[k], numbers[0], feature())

    start = noise(CALIBRATION, seed, numbers, shape).to(device)
    sampler.run(denoise, start, sampler_noise(CALIBRATION, seed, numbers, shape, device), observe=record)


@contextmanager
def _captured(denoise: Callable[..., Any], name: str | None) -> Iterator[Callable[[], Tensor] | None]:
    """Yield a function that returns the last output of the named submodule, or None without a name.

    A feature is float32 (B, C, ...), channels after the rows also where the module returns tokens (B, N, C).
    """
    if name is None:
        yield None
        return
    last: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: object) -> None:
        feature = unwrap(output).to("cpu", torch.float32, copy=True)  # later layers may work in place
        last[:] = [feature.transpose(1, 2) if feature.ndim == 3 else feature]

    def read() -> Tensor:
        if not last:
            raise EdadmError(f"module {name} was not run by the network call: name another one for the TDAC feature")
        return last.pop()

    handle = submodule(denoise, name).register_forward_hook(keep)
    try:
        yield read
    finally:
        handle.remove()


def submodule(denoise: Callable[..., Any], name: str) -> nn.Module:
    """Return the module whose output is the TDAC feature. Raises EdadmError for an unknown name and for a function."""
    if not isinstance(denoise, nn.Module):
        raise EdadmError(f"cannot read the feature {name} of a {type(denoise).__name__}: pass the network's nn.Module")
    modules = dict(denoise.named_modules())
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "list the names with named_modules()"
        raise EdadmError(f"the network has no module {name!r} for the TDAC feature: {hint}")
    return modules[name]

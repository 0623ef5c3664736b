"""Full-precision sampling trajectories, shared by every calibration method, bit-width and seed of the optimisation."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from edadm.calibration.files import read_tensors, write_tensors
from edadm.errors import EdadmError
from edadm.sampling.ddim import Denoise, Sampler, unwrap
from edadm.sampling.generate import Progress, sampler_noise
from edadm.sampling.noise import CALIBRATION, noise


@dataclass(frozen=True)
class Trajectories:
    """What the full-precision network saw while it sampled N images in T calls.

    x: float32 (T, N, C, H, W), network input of call k; x[0] is noise. timesteps: int64 (T,), largest first.
    features: float32 (T, B, C', ...) of the first B <= N trajectories, or None.
    """

    x: Tensor
    timesteps: Tensor
    features: Tensor | None = None

    def __post_init__(self) -> None:
        steps = len(self.timesteps)
        if self.x.dim() < 3 or len(self.x) != steps or self.timesteps.shape != (steps,):
            raise EdadmError(
                f"trajectories of shape {tuple(self.x.shape)} do not fit {steps} timesteps: make them again"
            )
        if self.features is not None and (
            self.features.dim() < 3 or len(self.features) != steps or self.features.shape[1] > self.count
        ):
            raise EdadmError(
                f"features of shape {tuple(self.features.shape)} do not belong to {steps} steps of {self.count} "
                "trajectories: make them again"
            )

    @property
    def steps(self) -> int:
        """Number of network calls T."""
        return len(self.timesteps)

    @property
    def count(self) -> int:
        """Number of trajectories N."""
        return self.x.shape[1]

    def save(self, path: Path, metadata: Mapping[str, object] | None = None) -> Path:
        """Write to a safetensors file with metadata as text, and return its path."""
        tensors = {"x": self.x, "timesteps": self.timesteps, "features": self.features}
        return write_tensors(path, tensors, metadata or {})

    @classmethod
    def load(cls, path: Path) -> Trajectories:
        """Read what `save` wrote. Raises EdadmError when the file is absent, broken or no such file."""
        tensors, _ = read_tensors(path, "trajectories file", ("x", "timesteps"), ("features",))
        return cls(tensors["x"], tensors["timesteps"], tensors.get("features"))


def collect(
    denoise: Denoise,
    sampler: Sampler,
    n: int,
    *,
    shape: Sequence[int],
    seed: int,
    batch: int = 64,
    feature_module: str | None = None,
    feature_batches: int | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Trajectories:
    """Sample n trajectories in float32 and keep every network input.

    denoise: the full-precision network, an nn.Module when features are wanted. shape: (C, H, W) of one sample.
    Batches are aligned to trajectory numbers and the last one is filled up, so a trajectory depends on
    (seed, its number, batch) only. feature_module: name of the submodule whose *output* is the TDAC feature: the
    released code's "input of the middle attention" is the output of ``mid_block.resnets.0``, the paper's feature the
    output of ``mid_block``. feature_batches: keep the features of that many first batches (released code for latent
    diffusion: 1), default all. Raises Diverged when NaN or Inf appears, EdadmError for an unknown module.
    """
    if n < 1 or batch < 1:
        raise ValueError(f"cannot sample {n} trajectories in batches of {batch}")
    visited = sampler.timesteps
    x = torch.empty(len(visited), n, *shape)
    features: list[Tensor] = []
    for start in range(0, n, batch):
        stop = min(start + batch, n)
        wanted = feature_batches is None or start < feature_batches * batch
        inputs, seen = _collect_batch(
            denoise, sampler, range(start, start + batch), shape, seed, device, feature_module if wanted else None
        )
        x[:, start:stop] = torch.stack(inputs)[:, : stop - start]
        if seen:
            features.append(torch.stack(seen)[:, : stop - start])
        if progress is not None:
            progress(stop, n)
    return Trajectories(x, torch.tensor(visited), torch.cat(features, dim=1) if features else None)


def _collect_batch(
    denoise: Denoise,
    sampler: Sampler,
    numbers: Sequence[int],
    shape: Sequence[int],
    seed: int,
    device: torch.device | str,
    feature_module: str | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the network inputs of every step and the features of every step (empty without a module)."""
    inputs: list[Tensor] = []
    features: list[Tensor] = []
    with _captured(denoise, feature_module) as feature:

        def record(k: int, t: int, x: Tensor, eps: Tensor) -> None:
            inputs.append(x.cpu())
            if feature is not None:
                features.append(feature())

        start = noise(CALIBRATION, seed, numbers, shape).to(device)
        sampler.run(denoise, start, sampler_noise(CALIBRATION, seed, numbers, shape, device), observe=record)
    return inputs, features


@contextmanager
def _captured(denoise: Denoise, name: str | None) -> Iterator[Callable[[], Tensor] | None]:
    """Yield a function that returns the last output of the named submodule (float32), or None without a name."""
    if name is None:
        yield None
        return
    last: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: object) -> None:
        last[:] = [unwrap(output).to("cpu", torch.float32, copy=True)]  # later layers may work in place

    def read() -> Tensor:
        if not last:
            raise EdadmError(f"module {name} was not run by the network call: name another one for the TDAC feature")
        return last.pop()

    handle = _submodule(denoise, name).register_forward_hook(keep)
    try:
        yield read
    finally:
        handle.remove()


def _submodule(denoise: Denoise, name: str) -> nn.Module:
    if not isinstance(denoise, nn.Module):
        raise EdadmError(f"cannot read the feature {name} of a {type(denoise).__name__}: pass the network's nn.Module")
    modules = dict(denoise.named_modules())
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "list the names with named_modules()"
        raise EdadmError(f"the network has no module {name!r} for the TDAC feature: {hint}")
    return modules[name]

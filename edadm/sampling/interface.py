"""What samplers, networks and those who watch a run agree on, and the loop that all samplers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from edadm.errors import Diverged, EdadmError

Denoise = Callable[[Tensor, Tensor], Any]
"""Network call: x (B, C, H, W) and times (B,) to the noise, as a tensor or as a diffusers output.

Times are int64, or float64 where a sampler has fractional ones. 2C channels are the noise and its learned variance.
"""

Correct = Callable[[int, float, Tensor, Tensor], Tensor]
"""Change of the predicted noise before the step: (call k, time, x, eps) to eps."""

Observe = Callable[[int, float, Tensor, Tensor], None]
"""Look at call k: (k, time, x given to the network, eps)."""

NoiseForStep = Callable[[int], Tensor]
"""Standard normal noise of the shape of x that is added after network call k."""

Step = Callable[[int, Tensor, Tensor, Tensor | None], Tensor]
"""The update after call k: (k, x, eps, learned variance or None) to the next x."""


class DiffusionSampler(ABC):
    """What turns noise into samples: a frozen dataclass, whose fields and ``version`` are its identity.

    version: raised whenever the same fields give other samples. needs_variance: whether a network must predict it.
    """

    version: int
    needs_variance: ClassVar[bool] = False

    @property
    @abstractmethod
    def timesteps(self) -> Sequence[float]:
        """The time given to the network in each call, in the order of the calls; int where all are whole."""

    @property
    def step_of_call(self) -> Sequence[int]:
        """The step, counted from 0, that each network call belongs to: one call a step, unless a sampler says more."""
        return range(len(self.timesteps))

    @abstractmethod
    def update(self, noise_for_step: NoiseForStep | None) -> Step:
        """Return the update of one run; what it remembers between the calls is its own."""

    def run(
        self,
        denoise: Denoise,
        x: Tensor,
        noise_for_step: NoiseForStep | None = None,
        observe: Observe | None = None,
        correct: Correct | None = None,
    ) -> Tensor:
        """Turn noise into samples.

        x: float (B, C, H, W). noise_for_step: needed by a sampler that adds noise. Returns samples of the shape and
        type of x, nominally in [-1, 1] where they are images. Raises Diverged when NaN or Inf appears, naming the call.
        """
        return _walk(self.timesteps, self.update(noise_for_step), denoise, x, observe, correct)


def require_fit(sampler: DiffusionSampler, prediction_type: str, learned_variance: bool) -> None:
    """Raise EdadmError when a network's output is not what the sampler steps with.

    prediction_type: as diffusers' schedulers name it. learned_variance: whether the output holds one beside the noise.
    """
    name = type(sampler).__name__
    if prediction_type != "epsilon":
        raise EdadmError(
            f"{name} steps with predicted noise (epsilon), this model predicts {prediction_type}: choose a model that "
            "predicts noise, or run the pipeline's own scheduler"
        )
    if sampler.needs_variance and not learned_variance:
        raise no_variance(sampler)


def no_variance(sampler: DiffusionSampler) -> EdadmError:
    """Return the error of a sampler that needs a learned variance and gets none."""
    return EdadmError(
        f"{type(sampler).__name__} needs the variance that DiT learns beside the noise, this model predicts noise only:"
        " choose a DDIM sampler, with eta 1 for as much noise as DDPM"
    )


def unwrap(output: Any) -> Tensor:
    """Return the tensor of a module's output: itself, or the first entry of a tuple or diffusers output."""
    return output if isinstance(output, Tensor) else output[0]


def split_variance(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Return (eps, learned variance) of a network output (B, channels or twice as many, H, W); None without one.

    Raises EdadmError for another number of channels.
    """
    if output.shape[1] == channels:
        return output, None
    if output.shape[1] == 2 * channels:
        eps, variance = output.split(channels, dim=1)
        return eps, variance
    raise EdadmError(
        f"the network returns {output.shape[1]} channels for samples of {channels}: expected {channels} (the noise) "
        f"or {2 * channels} (the noise and its variance)"
    )


def times(t: float, rows: int, device: torch.device | str) -> Tensor:
    """Return time t for every row: int64 where t is an int, else float64."""
    return torch.full((rows,), t, dtype=torch.int64 if isinstance(t, int) else torch.float64, device=device)


@torch.no_grad()
def _walk(
    timesteps: Sequence[float],
    step: Step,
    denoise: Denoise,
    x: Tensor,
    observe: Observe | None,
    correct: Correct | None,
) -> Tensor:
    """Call the network at every time and update x after each call."""
    for k, t in enumerate(timesteps):
        output = unwrap(denoise(x, times(t, len(x), x.device))).to(x.dtype)
        eps, variance = split_variance(output, x.shape[1])
        if correct is not None:
            eps = correct(k, t, x, eps)
        if observe is not None:
            observe(k, t, x, eps)
        x = step(k, x, eps, variance)
        _require_finite(x, k, t, len(timesteps))
    return x


def drawn(noise_for_step: NoiseForStep | None, k: int, eta: float) -> Tensor:
    """Return the noise that is added after call k. Raises ValueError where there is no source of it."""
    if noise_for_step is None:
        raise ValueError(f"the sampler adds noise after call {k} (eta {eta}) but noise_for_step is missing")
    return noise_for_step(k)


def _require_finite(x: Tensor, k: int, t: float, calls: int) -> None:
    finite = torch.isfinite(x).flatten(1).all(dim=1)
    if not finite.all():
        raise Diverged(
            f"NaN or Inf in {int((~finite).sum())} of {len(x)} samples after sampling step {k + 1} of {calls} "
            f"(timestep {t}): the network's output is not finite there. Use more bits, smaller learning rates or "
            "precision=fp32"
        )

"""What samplers, networks and those who watch a run agree on, and the loop that all samplers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from edadm.errors import Diverged, EdadmError

NOISE, FLOW = "epsilon", "flow_prediction"  # what networks predict, as diffusers' schedulers name it

Denoise = Callable[[Tensor, Tensor], Any]
"""Network call: x (B, C, ...) and times (B,) to the network's prediction, as a tensor or as a diffusers output.

Times are int64, or float64 where a sampler has fractional ones. 2C channels are the prediction and a learned variance.
The prediction is what the network was trained for: noise, a velocity, the clean sample, a flow. Calibration, ranges,
reconstruction and the error of every step (sqnr) see it as it is; a sampler converts it for its step only.
"""

Correct = Callable[[int, float, Tensor, Tensor], Tensor]
"""Change of the prediction before the step: (call k, time, x, prediction) to prediction."""

Observe = Callable[[int, float, Tensor, Tensor], None]
"""Look at call k: (k, time, x given to the network, prediction); under guidance the guided one."""

NoiseForStep = Callable[[int], Tensor]
"""Standard normal noise of the shape of x that is added after network call k."""

Step = Callable[[int, Tensor, Tensor, Tensor | None], Tensor]
"""The update after call k: (k, x, converted prediction, learned variance or None) to the next x."""


class DiffusionSampler(ABC):
    """What turns noise into samples: a frozen dataclass, whose fields and ``version`` are its identity.

    version: raised whenever the same fields give other samples. predictions: which outputs of a network it can step
    with. needs_variance: whether a network must predict it.
    """

    version: int
    predictions: ClassVar[tuple[str, ...]]
    needs_variance: ClassVar[bool] = False

    @property
    @abstractmethod
    def timesteps(self) -> Sequence[float]:
        """The time given to the network in each call, in the order of the calls; int where all are whole."""

    @property
    def step_of_call(self) -> Sequence[int]:
        """The step, counted from 0, that each network call belongs to: one call a step, unless a sampler says more."""
        return range(len(self.timesteps))

    def predicting(self, prediction_type: str) -> Self:
        """Return the same sampler for a network with this output, one of ``predictions``."""
        return self

    def converted(self, t: float, x: Tensor, output: Tensor) -> Tensor:
        """Return what the update takes of the network's output at time t: the output itself, unless a sampler says."""
        return output

    def started(self, noise: Tensor) -> Tensor:
        """Return the first input of the network, of standard normal noise: the noise itself, unless a sampler says."""
        return noise

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

        x: float (B, C, ...). noise_for_step: needed by a sampler that adds noise. Returns samples of the shape and
        type of x, nominally in [-1, 1] where they are images. Raises Diverged when NaN or Inf appears, naming the call.
        """
        return _walk(self, self.update(noise_for_step), denoise, self.started(x), observe, correct)


def fitted(sampler: DiffusionSampler, prediction_type: str, learned_variance: bool) -> DiffusionSampler:
    """Return the sampler for a network with this output. Raises EdadmError when it cannot step with it.

    prediction_type: as diffusers' schedulers name it. learned_variance: whether the output holds one beside it.
    """
    if prediction_type not in sampler.predictions:
        flow = "sampler=flow_euler" if prediction_type == FLOW else "a sampler of noise, such as sampler=ddim_uniform"
        raise EdadmError(
            f"{type(sampler).__name__} steps with {' or '.join(sampler.predictions)}, this model predicts "
            f"{prediction_type}: choose {flow}"
        )
    if sampler.needs_variance and not learned_variance:
        raise no_variance(sampler)
    return sampler.predicting(prediction_type)


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
    """Return (prediction, learned variance) of a network output (B, channels or twice as many, ...); None without one.

    Raises EdadmError for another number of channels.
    """
    if output.shape[1] == channels:
        return output, None
    if output.shape[1] == 2 * channels:
        prediction, variance = output.split(channels, dim=1)
        return prediction, variance
    raise EdadmError(
        f"the network returns {output.shape[1]} channels for samples of {channels}: expected {channels} (its "
        f"prediction) or {2 * channels} (and its variance)"
    )


def times(t: float, rows: int, device: torch.device | str) -> Tensor:
    """Return time t for every row: int64 where t is an int, else float64."""
    return torch.full((rows,), t, dtype=torch.int64 if isinstance(t, int) else torch.float64, device=device)


@torch.no_grad()
def _walk(
    sampler: DiffusionSampler,
    step: Step,
    denoise: Denoise,
    x: Tensor,
    observe: Observe | None,
    correct: Correct | None,
) -> Tensor:
    """Call the network at every time and update x after each call."""
    timesteps = sampler.timesteps
    for k, t in enumerate(timesteps):
        output = unwrap(denoise(x, times(t, len(x), x.device))).to(x.dtype)
        prediction, variance = split_variance(output, x.shape[1])
        if correct is not None:
            prediction = correct(k, t, x, prediction)
        if observe is not None:
            observe(k, t, x, prediction)
        x = step(k, x, sampler.converted(t, x, prediction), variance)
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

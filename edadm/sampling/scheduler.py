"""A scheduler of diffusers, run as its pipelines run it, with noise that depends on the image number alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Self

from torch import Tensor

from edadm.errors import EdadmError
from edadm.sampling.ddpm import posterior_mean
from edadm.sampling.diffusion import SAMPLE, VELOCITY, sample_of
from edadm.sampling.interface import NOISE, DiffusionSampler, NoiseForStep, Step, drawn
from edadm.sampling.schedule import check_eta

PRK_STEPS, PRK_CALLS = 3, 4  # the first steps of PNDM, where they are not skipped, and the calls of each


@dataclass(frozen=True)
class SchedulerSampler(DiffusionSampler):
    """The timesteps, updates and prediction types of a scheduler of diffusers.

    scheduler: its class, one of STEPS. options: of its constructor, all that the class has, but prediction_type. eta:
    of DDIM. Made of a scheduler_config.json by `edadm.sampling.from_scheduler.sampler_of`.
    The states that the network sees have unit variance, also where the scheduler's own grow with the noise (Euler).
    """

    predictions: ClassVar[tuple[str, ...]] = (NOISE, VELOCITY, SAMPLE)
    scheduler: str
    steps: int
    options: Mapping[str, Any] = field(default_factory=dict)
    eta: float = 0.0
    prediction_type: str = NOISE
    version: int = 1

    def __post_init__(self) -> None:
        check_eta(self.eta)
        least, trained = PRK_STEPS + 1 if self._has_prk else 1, self.options.get("num_train_timesteps", 1000)
        try:
            timesteps = self._made().timesteps if least <= self.steps <= trained else None
        except (ValueError, NotImplementedError, ImportError, IndexError) as error:
            raise EdadmError(f"{self.scheduler} does not take {self.steps} steps of these options: {error}") from error
        if timesteps is None or timesteps.max() > trained - 1 or timesteps.min() < 0:
            raise EdadmError(
                f"{self.scheduler} cannot sample in {self.steps} steps: choose {least} to fewer than {trained}, the "
                "steps of the training"
            )
        if self.scheduler == "PNDMScheduler" and self.prediction_type == SAMPLE:
            raise EdadmError(
                "PNDMScheduler steps with epsilon or v_prediction, this model predicts sample: choose a sampler of "
                "ours, such as sampler=ddim_uniform"
            )

    def _made(self) -> Any:
        """Return the scheduler of diffusers at its start."""
        import diffusers

        scheduler = getattr(diffusers, self.scheduler)(**self.options, prediction_type=self.prediction_type)
        scheduler.set_timesteps(self.steps)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        return scheduler

    @property
    def _has_prk(self) -> bool:
        return self.scheduler == "PNDMScheduler" and not self.options.get("skip_prk_steps", False)

    @cached_property
    def _visited(self) -> list[float]:
        visited = self._made().timesteps.tolist()
        return [int(t) for t in visited] if all(float(t).is_integer() for t in visited) else visited

    @property
    def timesteps(self) -> list[float]:
        """The time of each network call; the first steps of PNDM make several."""
        return self._visited

    @property
    def step_of_call(self) -> list[int]:
        """The step of each network call."""
        calls = len(self._visited)
        if self._has_prk:
            several = [step for step in range(PRK_STEPS) for _ in range(PRK_CALLS)]
            return several + list(range(PRK_STEPS, PRK_STEPS + calls - len(several)))
        if self.scheduler == "PNDMScheduler" and calls > 1:
            return [0, *range(calls - 1)]
        return list(range(calls))

    def predicting(self, prediction_type: str) -> Self:
        """Return the same sampler for a network with this output."""
        return dataclasses.replace(self, prediction_type=prediction_type)

    def started(self, noise: Tensor) -> Tensor:
        """Return the first input of the network, of standard normal noise."""
        scheduler = self._made()
        return scheduler.scale_model_input(noise * scheduler.init_noise_sigma, scheduler.timesteps[0])

    def update(self, noise_for_step: NoiseForStep | None) -> Step:
        """Return the update of one run; see `edadm.sampling.interface.DiffusionSampler`."""
        return STEPS[self.scheduler](self, self._made(), noise_for_step)


def _deterministic(sampler: SchedulerSampler, scheduler: Any, noise_for_step: NoiseForStep | None) -> Step:
    def step(k: int, x: Tensor, output: Tensor, variance: Tensor | None) -> Tensor:
        return scheduler.step(output, scheduler.timesteps[k], x).prev_sample

    return step


def _ddim(sampler: SchedulerSampler, scheduler: Any, noise_for_step: NoiseForStep | None) -> Step:
    def step(k: int, x: Tensor, output: Tensor, variance: Tensor | None) -> Tensor:
        z = drawn(noise_for_step, k, sampler.eta).to(x.dtype) if sampler.eta > 0 else None
        return scheduler.step(output, scheduler.timesteps[k], x, eta=sampler.eta, variance_noise=z).prev_sample

    return step


def _euler(sampler: SchedulerSampler, scheduler: Any, noise_for_step: NoiseForStep | None) -> Step:
    """Scale the states to unit variance between the steps, as scale_model_input does before the network call."""
    scales = (scheduler.sigmas.double() ** 2 + 1).sqrt()
    scheduler.is_scale_input_called = True

    def step(k: int, x: Tensor, output: Tensor, variance: Tensor | None) -> Tensor:
        return scheduler.step(output, scheduler.timesteps[k], x * scales[k]).prev_sample / scales[k + 1]

    return step


def _ddpm(sampler: SchedulerSampler, scheduler: Any, noise_for_step: NoiseForStep | None) -> Step:
    """DDPM eq. 7; the scheduler's own step draws its noise itself, for the batch as a whole."""
    visited, signal, config = sampler.timesteps, scheduler.alphas_cumprod, scheduler.config

    def step(k: int, x: Tensor, output: Tensor, variance: Tensor | None) -> Tensor:
        a = signal[visited[k]]
        b = signal[visited[k + 1]] if k + 1 < len(visited) else signal.new_ones(())
        x0 = sample_of(sampler.prediction_type, x, output, a)
        if config.clip_sample:
            x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
        mean = posterior_mean(x0, x, a, b)
        if visited[k] == 0:
            return mean
        beta = 1 - a / b
        added = beta if config.variance_type == "fixed_large" else (beta * (1 - b) / (1 - a)).clamp(min=1e-20)
        return mean + added.sqrt() * drawn(noise_for_step, k, 1.0).to(x.dtype)

    return step


STEPS = {
    "DDIMScheduler": _ddim,
    "DDPMScheduler": _ddpm,
    "PNDMScheduler": _deterministic,
    "DPMSolverMultistepScheduler": _deterministic,
    "UniPCMultistepScheduler": _deterministic,
    "EulerDiscreteScheduler": _euler,
}

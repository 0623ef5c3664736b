"""DPM-Solver, DPM-Solver++ and UniPC: multistep solvers of the probability flow, on diffusers' schedulers.

All three predict the clean sample (the "++" form). Deterministic, one network call a step, whole-batch coefficients in
float32, since these schedulers cast to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from edadm.errors import EdadmError
from edadm.sampling.diffusion import LatentBetaSampler
from edadm.sampling.interface import NoiseForStep, Step
from edadm.sampling.schedule import exact_betas


@dataclass(frozen=True)
class DPMSolver(LatentBetaSampler):
    """The solver behind latent diffusion's DPM-Solver switch: order 2, midpoint form, evenly spaced continuous times.

    The network gets fractional times (20 steps: 999, 949.05, 899.1, ...) and the run ends at the noise level of
    training step 0. The very last step is of order 1 when there are fewer than 15.
    Source: golden README, ldm, 5.5 and 5.8.
    """

    steps: int = 20

    def __post_init__(self) -> None:
        _check(self.steps, self.train_steps)

    @cached_property
    def _grid(self) -> Tensor:
        """The times between the steps, float32 (steps + 1,), in the original's order of operations."""
        return (torch.linspace(1.0, 1 / self.train_steps, self.steps + 1) - 1 / self.train_steps) * self.train_steps

    @property
    def timesteps(self) -> list[float]:
        """The time of each network call, float32 values."""
        return self._grid[:-1].tolist()

    def update(self, noise_for_step: NoiseForStep | None) -> Step:
        """Return the update of one run; see `edadm.sampling.interface.DiffusionSampler`."""
        from diffusers import DPMSolverMultistepScheduler

        scheduler: Any = DPMSolverMultistepScheduler(self.train_steps, final_sigmas_type="sigma_min")
        scheduler.set_timesteps(self.steps)
        scheduler.timesteps, scheduler.sigmas = self._grid[:-1], self._sigmas()
        return _update(scheduler)

    def _sigmas(self) -> Tensor:
        """The ratios of noise to signal between the steps, float32 (steps + 1,); log alpha is piecewise linear in t."""
        signal = self.products.float()
        log_alpha = np.interp(self._grid.double(), np.arange(self.train_steps), 0.5 * signal.double().log())
        return torch.from_numpy(np.sqrt(np.expm1(-2 * log_alpha))).float()


@dataclass(frozen=True)
class _WholeTimes(LatentBetaSampler):
    """What DPM-Solver++ and UniPC share: whole times, and a last step to a clean sample.

    order: 1 to 3; the authors use 2 for guided and 3 for unconditional sampling.
    """

    scheduler_name: ClassVar[str]  # of the class in diffusers
    steps: int = 20
    order: int = 2

    def __post_init__(self) -> None:
        _check(self.steps, self.train_steps, self.order)

    @property
    def timesteps(self) -> list[int]:
        """Evenly spaced timesteps from the noisiest one, without the 0 that the last step goes beyond."""
        return np.linspace(0, self.train_steps - 1, self.steps + 1).round().astype(int).tolist()[:0:-1]

    def update(self, noise_for_step: NoiseForStep | None) -> Step:
        """Return the update of one run; see `edadm.sampling.interface.DiffusionSampler`."""
        import diffusers

        betas = exact_betas(self.beta_schedule, self.beta_start, self.beta_end, self.train_steps).numpy()
        scheduler_class = getattr(diffusers, self.scheduler_name)
        scheduler = scheduler_class(self.train_steps, trained_betas=betas, solver_order=self.order)
        scheduler.set_timesteps(self.steps)
        return _update(scheduler)


@dataclass(frozen=True)
class DPMSolverPP(_WholeTimes):
    """DPM-Solver++ (Lu et al. 2022) as diffusers runs it."""

    scheduler_name = "DPMSolverMultistepScheduler"


@dataclass(frozen=True)
class UniPC(_WholeTimes):
    """UniPC (Zhao et al. 2023) as diffusers runs it: every network call also corrects the step before it.

    The corrector changes x after the call, so the samples that are seen are the predictor's.
    """

    scheduler_name = "UniPCMultistepScheduler"


def _update(scheduler: Any) -> Step:
    scheduler.set_begin_index(0)

    def step(k: int, x: Tensor, eps: Tensor, variance: Tensor | None) -> Tensor:
        return scheduler.step(eps, scheduler.timesteps[k], x).prev_sample

    return step


def _check(steps: int, train_steps: int, order: int = 2) -> None:
    if not 1 <= steps < train_steps:
        raise EdadmError(f"cannot sample in {steps} steps: choose 1 to {train_steps - 1}, fewer than the training's")
    if order not in (1, 2, 3):
        raise EdadmError(f"there is no multistep solver of order {order} here: choose 1, 2 or 3")

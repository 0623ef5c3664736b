"""DDIM and PLMS as latent diffusion and Stable Diffusion run them, on diffusers' update rules.

Their timesteps start at 1 instead of 0 and the last update ends at the noise level of training step 0, not at a clean
sample. diffusers takes the next timestep from an even spacing and makes exactly the number of steps asked for, which
fits neither "quad" nor numbers of steps that do not divide the training's. Its schedulers therefore get the visited
timesteps as their whole training schedule, and count in positions of it; the network gets the timesteps themselves.
Source: golden README, ldm, 5.3 to 5.7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from edadm.sampling.diffusion import LatentBetaSampler
from edadm.sampling.interface import NoiseForStep, Step, drawn
from edadm.sampling.schedule import check_eta, leading_timesteps


@dataclass(frozen=True)
class LatentDDIM(LatentBetaSampler):
    """DDIM with leading timesteps.

    spacing, steps: see `edadm.sampling.schedule.leading_timesteps`. eta: 0 deterministic, 1 as much noise as DDPM;
    noise is added in the last step too.
    """

    spacing: str = "uniform"
    steps: int = 20
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_eta(self.eta)
        leading_timesteps(self.spacing, self.steps, self.train_steps)

    @property
    def timesteps(self) -> list[int]:
        """The timestep of each network call, in the order of the calls."""
        return leading_timesteps(self.spacing, self.steps, self.train_steps)

    def update(self, noise_for_step: NoiseForStep | None) -> Step:
        """Return the update of one run; see `edadm.sampling.interface.DiffusionSampler`."""
        from diffusers import DDIMScheduler

        visited = self.timesteps
        scheduler: Any = DDIMScheduler(len(visited), clip_sample=False)
        _narrow(scheduler, self, visited)

        def step(k: int, x: Tensor, eps: Tensor, variance: Tensor | None) -> Tensor:
            z = drawn(noise_for_step, k, self.eta).to(x.dtype) if self.eta > 0 else None
            return scheduler.step(eps, len(visited) - 1 - k, x, eta=self.eta, variance_noise=z).prev_sample

        return step


@dataclass(frozen=True)
class PLMS(LatentBetaSampler):
    """Pseudo linear multistep sampling: Adams-Bashforth of order 4 on the predicted noise.

    The first step calls the network twice (at its own timestep, and at the next one on a trial update) and averages;
    orders 2 and 3 follow. A run of n steps makes n + 1 calls. Deterministic. Parameters as of `LatentDDIM`. Other
    predictions are extrapolated as the noise they stand for; diffusers' own PNDM extrapolates velocities themselves.
    """

    spacing: str = "uniform"
    steps: int = 20

    def __post_init__(self) -> None:
        leading_timesteps(self.spacing, self.steps, self.train_steps)

    @property
    def timesteps(self) -> list[int]:
        """The timestep of each network call: those of the steps, the second twice."""
        visited = leading_timesteps(self.spacing, self.steps, self.train_steps)
        return [visited[0], visited[min(1, len(visited) - 1)], *visited[1:]]

    @property
    def step_of_call(self) -> list[int]:
        """The step of each network call: the first step has two."""
        return [0, *range(len(self.timesteps) - 1)]

    def update(self, noise_for_step: NoiseForStep | None) -> Step:
        """Return the update of one run; see `edadm.sampling.interface.DiffusionSampler`."""
        from diffusers import PNDMScheduler

        visited = leading_timesteps(self.spacing, self.steps, self.train_steps)
        scheduler: Any = PNDMScheduler(len(visited), skip_prk_steps=True)
        _narrow(scheduler, self, visited)
        last = len(visited) - 1
        positions = [last, last - 1, *range(last - 1, -1, -1)]

        def step(k: int, x: Tensor, eps: Tensor, variance: Tensor | None) -> Tensor:
            return scheduler.step(eps, positions[k], x).prev_sample

        return step


def _narrow(scheduler: Any, sampler: LatentDDIM | PLMS, visited: list[int]) -> None:
    """Let a scheduler of as many training steps as visited timesteps step through these, ending at training step 0.

    The products are those of the checkpoint's float32 buffer; coefficients are computed from them in float64.
    """
    signal = sampler.products.float()
    scheduler.alphas_cumprod = signal[visited[::-1]].double()
    scheduler.final_alpha_cumprod = signal[0].double()
    scheduler.set_timesteps(len(visited))

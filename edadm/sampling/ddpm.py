"""The respaced DDPM of improved diffusion and DiT, with the variance that the network has learned.

diffusers' DDPMScheduler draws the noise of a step itself, so the update is written out here: noise must depend on the
image number alone. Source: improved DDPM eqs. 12 to 15, DDPM eq. 7, golden README, ldm, 5.6.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from edadm.sampling.diffusion import BetaSampler
from edadm.sampling.interface import NoiseForStep, Step, drawn, no_variance
from edadm.sampling.schedule import timesteps


@dataclass(frozen=True)
class RespacedDDPM(BetaSampler):
    """Ancestral sampling on ``steps`` of the training's timesteps, evenly spaced and rounded.

    The network returns 2C channels: the noise, and v in [-1, 1] nominally, which interpolates the logarithm of the
    variance between its two bounds, the posterior variance and beta. No noise is added in the last step; nothing is
    clipped.
    """

    needs_variance: ClassVar[bool] = True
    steps: int = 250

    def __post_init__(self) -> None:
        timesteps("linspace", self.steps, self.train_steps)

    @property
    def timesteps(self) -> list[int]:
        """The timestep of each network call, in the order of the calls."""
        return timesteps("linspace", self.steps, self.train_steps)

    def step(self, x: Tensor, eps: Tensor, v: Tensor, t: int, t_next: int, z: Tensor | None = None) -> Tensor:
        """Go from timestep t to t_next, -1 for the last step.

        x, eps, v: float (B, C, H, W). z: standard normal of the same shape, needed when t_next >= 0.
        Returns a new tensor of the type of x; coefficients are computed in float64.
        """
        a, b = self._alpha_bar(t), self._alpha_bar(t_next)
        beta = 1 - a / b
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        mean = posterior_mean(x0, x, a, b)
        if t_next < 0:
            return mean
        if z is None:
            raise ValueError(f"the step from {t} to {t_next} adds noise but z is missing")
        share = (v + 1) / 2
        log_variance = share * beta.log() + (1 - share) * (beta * (1 - b) / (1 - a)).log()
        return mean + (0.5 * log_variance).exp() * z

    def _alpha_bar(self, t: int) -> Tensor:
        return self.products[t] if t >= 0 else self.products.new_ones(())

    def update(self, noise_for_step: NoiseForStep | None) -> Step:
        """Return the update of one run; see `edadm.sampling.interface.DiffusionSampler`."""
        visited = self.timesteps
        pairs = list(zip(visited, [*visited[1:], -1], strict=True))

        def step(k: int, x: Tensor, eps: Tensor, variance: Tensor | None) -> Tensor:
            if variance is None:
                raise no_variance(self)
            t, t_next = pairs[k]
            z = drawn(noise_for_step, k, 1.0).to(x.dtype) if t_next >= 0 else None
            return self.step(x, eps, variance, t, t_next, z)

        return step


def posterior_mean(x0: Tensor, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the mean of the state of signal share b, given x of signal share a and the clean sample (DDPM eq. 7)."""
    beta = 1 - a / b
    return (b.sqrt() * beta / (1 - a)) * x0 + ((1 - beta).sqrt() * (1 - b) / (1 - a)) * x

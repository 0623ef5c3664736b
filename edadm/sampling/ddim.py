"""The DDIM sampler with explicit (timestep, next timestep) pairs.

diffusers' own step derives the next timestep from an even spacing, which is wrong for quadratic timesteps; schedules
still come from its scheduler (`edadm.sampling.schedule`). Source: DDIM eqs. 12 and 16, golden README 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from edadm.sampling.diffusion import BetaSampler
from edadm.sampling.interface import NoiseForStep, Step
from edadm.sampling.schedule import alphas_cumprod, check_eta, timesteps


@dataclass(frozen=True)
class Sampler(BetaSampler):
    """DDIM: which timesteps are visited and how much noise is added back.

    spacing, steps: see `edadm.sampling.schedule.timesteps`. eta: 0 deterministic, 1 as much noise as DDPM.
    """

    spacing: str = "quad"
    steps: int = 20
    eta: float = 0.0

    def __post_init__(self) -> None:
        check_eta(self.eta)
        timesteps(self.spacing, self.steps, self.train_steps)

    @property
    def timesteps(self) -> list[int]:
        """The timestep of each network call, in the order of the calls."""
        return timesteps(self.spacing, self.steps, self.train_steps)

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(t, next t) of each step; the last one goes to -1, where nothing but the image is left."""
        visited = self.timesteps
        return list(zip(visited, [*visited[1:], -1], strict=True))

    def alpha_bar(self, t: int) -> Tensor:
        """Return the share of signal variance at timestep t, 0-d float32 on the CPU; 1 at t = -1."""
        schedule = alphas_cumprod(self.beta_schedule, self.beta_start, self.beta_end, self.train_steps)
        return schedule[t] if t >= 0 else schedule.new_ones(())

    def predict_x0(self, x: Tensor, eps: Tensor, t: int) -> Tensor:
        """Return the image that x would be without the noise eps; never clipped."""
        a = self.alpha_bar(t)
        return (x - eps * (1 - a).sqrt()).div_(a.sqrt())

    def step(self, x: Tensor, eps: Tensor, t: int, t_next: int, z: Tensor | None = None) -> Tensor:
        """Go from timestep t to t_next.

        x, eps: float32 (B, ...). z: standard normal of the same shape, needed when noise is added (eta > 0 and
        t_next >= 0). Returns a new float32 tensor.
        """
        a, b = self.alpha_bar(t), self.alpha_bar(t_next)
        sigma = self.eta * ((1 - a / b) * (1 - b) / (1 - a)).sqrt()
        direction = ((1 - b) - sigma**2).sqrt()
        out = self.predict_x0(x, eps, t).mul_(b.sqrt())
        if sigma > 0:
            if z is None:
                raise ValueError(f"the step from {t} to {t_next} adds noise (eta {self.eta}) but z is missing")
            out += sigma * z
        return out.add_(direction * eps)

    def update(self, noise_for_step: NoiseForStep | None) -> Step:
        """Return the update of one run; see `edadm.sampling.interface.DiffusionSampler`."""
        pairs = self.pairs

        def step(k: int, x: Tensor, eps: Tensor, variance: Tensor | None) -> Tensor:
            z = noise_for_step(k) if noise_for_step is not None and self.eta > 0 else None
            return self.step(x, eps, *pairs[k], z)

        return step

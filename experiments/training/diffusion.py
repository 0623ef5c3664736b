"""The forward process of a diffusion model and the losses of its network."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edadm.sampling.schedule import exact_betas

SNR_LIMIT = 5.0
CLIPPED = 1  # the posterior variance of the first step is zero, that of the second takes its place


class Diffusion:
    """The noise of the training steps, on a device; tables are float32 (T,), computed in float64."""

    def __init__(self, beta_schedule: str, beta_start: float, beta_end: float, device: torch.device | str):
        betas = exact_betas(beta_schedule, beta_start, beta_end)
        products = (1 - betas).cumprod(0)
        before = torch.cat([products.new_ones(1), products[:-1]])
        posterior = betas * (1 - before) / (1 - products)
        posterior[0] = posterior[CLIPPED]
        tables = {
            "signal": products,
            "loss_weight": (SNR_LIMIT * (1 - products) / products).clamp(max=1),
            "log_beta": betas.log(),
            "log_posterior": posterior.log(),
            "of_x0": betas * before.sqrt() / (1 - products),
        }
        self._tables = {name: table.float().to(device) for name, table in tables.items()}
        self.steps = len(betas)

    def _at(self, name: str, t: Tensor) -> Tensor:
        return self._tables[name][t][:, None, None, None]

    def drawn(self, x0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw the steps int64 (B,) and the noise of the shape of x0 (B, C, H, W)."""
        t = torch.randint(0, self.steps, (len(x0),), generator=generator, device=x0.device)
        return t, torch.randn(x0.shape, generator=generator, device=x0.device)

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Return x_t."""
        signal = self._at("signal", t)
        return signal.sqrt() * x0 + (1 - signal).sqrt() * noise

    def noise_loss(self, eps: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return the squared error of each row (B,), weighted with min(1, 5 / SNR) (Hang et al. 2023)."""
        return (eps.float() - noise).square().mean((1, 2, 3)) * self._tables["loss_weight"][t]

    def variance_loss(self, x0: Tensor, x: Tensor, t: Tensor, eps: Tensor, v: Tensor) -> Tensor:
        """Return the variational bound of each row (B,) in bits per number, which trains the variance v alone.

        v: in [-1, 1] nominally, places the logarithm of the variance between its two bounds. Source: improved DDPM,
        eqs. 14 to 16. Latents are no bytes, so the first step is a Gaussian like the others.
        """
        signal, eps, v = self._at("signal", t), eps.detach().float(), v.float()
        found = (x - (1 - signal).sqrt() * eps) / signal.sqrt()
        mean_error = self._at("of_x0", t) * (x0 - found)  # both means have the same share of x
        share, wanted = (v + 1) / 2, self._at("log_posterior", t)
        log_variance = share * self._at("log_beta", t) + (1 - share) * wanted
        nats = log_variance - wanted - 1 + (wanted - log_variance).exp() + mean_error.square() * (-log_variance).exp()
        return nats.mean((1, 2, 3)) / (2 * math.log(2))

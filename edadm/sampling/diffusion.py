"""What the samplers of a diffusion process share: its noise schedule, and what its network may predict."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from edadm.sampling.interface import NOISE, DiffusionSampler
from edadm.sampling.schedule import exact_alphas_cumprod

VELOCITY, SAMPLE = "v_prediction", "sample"  # as diffusers' schedulers name them


@dataclass(frozen=True, kw_only=True)
class BetaSampler(DiffusionSampler):
    """A sampler that steps with predicted noise along a schedule of betas.

    beta_schedule, beta_start, beta_end, train_steps: see `edadm.sampling.schedule`. prediction_type: of the network;
    what is no noise is converted before each step.
    """

    predictions: ClassVar[tuple[str, ...]] = (NOISE, VELOCITY, SAMPLE)
    beta_schedule: str = "linear"
    beta_start: float = 1e-4
    beta_end: float = 2e-2
    train_steps: int = 1000
    prediction_type: str = NOISE
    version: int = 1

    @property
    def products(self) -> Tensor:
        """The share of signal variance at each training step, float64 (train_steps,)."""
        return exact_alphas_cumprod(self.beta_schedule, self.beta_start, self.beta_end, self.train_steps)

    def signal(self, t: float) -> Tensor:
        """Return the share of signal variance at time t, 0-d float64; its logarithm is linear between whole times."""
        logarithm = np.interp(t, np.arange(self.train_steps), self.products.log().numpy())
        return torch.tensor(logarithm, dtype=torch.float64).exp()

    def predicting(self, prediction_type: str) -> Self:
        """Return the same sampler for a network with this output."""
        return dataclasses.replace(self, prediction_type=prediction_type)

    def converted(self, t: float, x: Tensor, output: Tensor) -> Tensor:
        """Return the noise in x at time t that the network's output stands for."""
        if self.prediction_type == NOISE:
            return output
        return noise_of(self.prediction_type, x, output, self.signal(t))


@dataclass(frozen=True, kw_only=True)
class LatentBetaSampler(BetaSampler):
    """A sampler with the schedule of LDM-4 by default."""

    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.0015
    beta_end: float = 0.0195


def noise_of(prediction_type: str, x: Tensor, output: Tensor, signal: Tensor) -> Tensor:
    """Return the noise eps of x = sqrt(signal) x0 + sqrt(1 - signal) eps, from what a network predicts of x.

    "sample": x0. "v_prediction": sqrt(signal) eps - sqrt(1 - signal) x0 (Salimans and Ho 2022, appendix D).
    """
    if prediction_type == VELOCITY:
        return signal.sqrt() * output + (1 - signal).sqrt() * x
    if prediction_type == SAMPLE:
        return (x - signal.sqrt() * output) / (1 - signal).sqrt()
    raise ValueError(f"no noise in {prediction_type}: expected {VELOCITY} or {SAMPLE}")


def sample_of(prediction_type: str, x: Tensor, output: Tensor, signal: Tensor) -> Tensor:
    """Return the clean sample x0 of x from what a network predicts of it; see `noise_of`."""
    if prediction_type == NOISE:
        return (x - (1 - signal).sqrt() * output) / signal.sqrt()
    if prediction_type == VELOCITY:
        return signal.sqrt() * x - (1 - signal).sqrt() * output
    return output

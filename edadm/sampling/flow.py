"""Euler steps along a rectified flow, as diffusers' pipelines of Stable Diffusion 3 and Flux take them.

The network predicts the velocity noise - x0 of x = sigma noise + (1 - sigma) x0. Source: Esser et al. 2024, sections 2
and 5.3.2; diffusers' FlowMatchEulerDiscreteScheduler and the pipelines' own choice of sigmas and times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from edadm.errors import EdadmError
from edadm.sampling.interface import FLOW, DiffusionSampler, NoiseForStep, Step


@dataclass(frozen=True)
class FlowEuler(DiffusionSampler):
    """Euler steps over noise levels sigma from 1 to 0.

    Before the shift, the sigmas of the calls are evenly spaced from 1 to ``last_sigma``, or to 1 / steps where it is
    None (Flux); SD3 goes down to the smallest sigma of its training. shift: s in s sigma / (1 + (s - 1) sigma), 3 for
    SD3; that of an image size is `dynamic_shift`. time_scale: the network's time at sigma 1, 1000 for SD3 and 1 for
    Flux.
    """

    predictions: ClassVar[tuple[str, ...]] = (FLOW,)
    steps: int = 28
    shift: float = 3.0
    last_sigma: float | None = None
    time_scale: float = 1000.0
    version: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise EdadmError(f"cannot sample in {self.steps} steps: choose at least 1")
        if self.shift <= 0:
            raise EdadmError(f"the shift of the noise levels is {self.shift}: choose a positive number, 1 for none")
        if self.last_sigma is not None and not 0 < self.last_sigma <= 1:
            raise EdadmError(f"last_sigma is {self.last_sigma}: choose a noise level above 0 and up to 1")

    @property
    def sigmas(self) -> Tensor:
        """The noise levels between the steps, from 1 to 0, float32 (steps + 1,)."""
        last = 1 / self.steps if self.last_sigma is None else self.last_sigma
        levels = shifted(np.linspace(1, last, self.steps), self.shift)
        return torch.from_numpy(np.append(levels, 0.0)).float()

    @property
    def timesteps(self) -> list[float]:
        """The time given to the network in each call."""
        return (self.sigmas[:-1].double() * self.time_scale).tolist()

    def update(self, noise_for_step: NoiseForStep | None) -> Step:
        """Return the update of one run; see `edadm.sampling.interface.DiffusionSampler`."""
        sizes = self.sigmas.diff()

        def step(k: int, x: Tensor, velocity: Tensor, variance: Tensor | None) -> Tensor:
            return x + sizes[k] * velocity

        return step


def shifted(sigma: np.ndarray | float, shift: float) -> np.ndarray | float:
    """Return the noise levels moved towards noise, as larger images need (Esser et al. 2024, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def dynamic_shift(
    tokens: int, base_shift: float = 0.5, max_shift: float = 1.15, base_tokens: int = 256, max_tokens: int = 4096
) -> float:
    """Return the shift for an image of so many tokens: exp of a line through (base_tokens, base_shift) and the max."""
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return math.exp(base_shift + slope * (tokens - base_tokens))

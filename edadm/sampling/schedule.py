"""Noise schedules and the timesteps a sampler visits."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from torch import Tensor

from edadm.errors import EdadmError

SPACINGS = ("uniform", "quad")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")


@cache
def alphas_cumprod(
    beta_schedule: str = "linear", beta_start: float = 1e-4, beta_end: float = 2e-2, train_steps: int = 1000
) -> Tensor:
    """Return the product of (1 - beta) up to each training timestep, from diffusers' DDIMScheduler.

    Float32 (train_steps,); shared between callers, so never change it in place. Linear betas are spaced in float64
    and then rounded, as in the original DDIM code (golden README 4.1); diffusers' own are spaced in float32.
    Raises EdadmError for a schedule that is not in BETA_SCHEDULES.
    """
    if beta_schedule not in BETA_SCHEDULES:
        raise EdadmError(f"no beta schedule {beta_schedule!r}: choose one of {', '.join(BETA_SCHEDULES)}")
    from diffusers import DDIMScheduler

    betas = np.linspace(beta_start, beta_end, train_steps) if beta_schedule == "linear" else None
    scheduler: Any = DDIMScheduler(train_steps, beta_start, beta_end, beta_schedule, trained_betas=betas)
    return scheduler.alphas_cumprod


def timesteps(spacing: str, steps: int, train_steps: int = 1000) -> list[int]:
    """Return the timesteps of a sampling run in the order they are visited, largest first (golden README 4.2).

    spacing: "uniform" is every (train_steps // steps)-th timestep, which makes **more than** ``steps`` entries when
    ``steps`` does not divide ``train_steps`` (30 of 1000 gives 31), as in the official code. "quad" is dense at
    low noise: squares of evenly spaced numbers up to 0.8 train_steps, truncated, so low timesteps may repeat.
    One step means timestep 0 in both.
    Raises EdadmError for an unknown spacing or an impossible number of steps.
    """
    if not 1 <= steps <= train_steps:
        raise EdadmError(f"cannot sample in {steps} steps: choose 1 to {train_steps}, the steps of the training")
    if spacing == "uniform":
        ascending = list(range(0, train_steps, train_steps // steps))
    elif spacing == "quad":
        ascending = [int(root**2) for root in np.linspace(0, np.sqrt(train_steps * 0.8), steps)]
    else:
        raise EdadmError(f"no timestep spacing {spacing!r}: choose one of {', '.join(SPACINGS)}")
    return ascending[::-1]

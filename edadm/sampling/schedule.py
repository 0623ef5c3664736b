"""Noise schedules and the timesteps a sampler visits."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edadm.errors import EdadmError

SPACINGS = ("uniform", "quad", "linspace")
LEADING_SPACINGS = ("uniform", "quad")
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
    "linspace" is evenly spaced from 0 to train_steps - 1 and rounded: the respaced timesteps of DiT and of improved
    DDPM. One step means timestep 0 in all.
    Raises EdadmError for an unknown spacing or an impossible number of steps.
    """
    _check_steps(steps, train_steps)
    if spacing == "uniform":
        ascending = list(range(0, train_steps, train_steps // steps))
    elif spacing == "quad":
        ascending = _squares(steps, train_steps)
    elif spacing == "linspace":
        ascending = np.linspace(0, train_steps - 1, steps).round().astype(int).tolist()
    else:
        raise EdadmError(f"no timestep spacing {spacing!r}: choose one of {', '.join(SPACINGS)}")
    return ascending[::-1]


def leading_timesteps(spacing: str, steps: int, train_steps: int = 1000) -> list[int]:
    """Return the timesteps of latent diffusion's DDIM and PLMS, those of `timesteps` plus one, largest first.

    "uniform" has more than ``steps`` entries when ``steps`` does not divide ``train_steps``; when train_steps // steps
    divides train_steps - 1, the largest would be train_steps, which the training does not have, and the original code
    ends with an IndexError. "quad" stays below 0.8 train_steps + 2 (golden README, ldm, 5.3).
    Raises EdadmError for such a number of steps, naming the nearest that work.
    """
    if spacing not in LEADING_SPACINGS:
        raise EdadmError(f"no leading timestep spacing {spacing!r}: choose one of {', '.join(LEADING_SPACINGS)}")
    _check_steps(steps, train_steps)
    if spacing == "uniform" and not _leading_fits(steps, train_steps):
        fewer = next((n for n in range(steps, 0, -1) if _leading_fits(n, train_steps)), None)
        more = next((n for n in range(steps, train_steps + 1) if _leading_fits(n, train_steps)), None)
        near = " or ".join(str(n) for n in (fewer, more) if n is not None)
        raise EdadmError(
            f"{steps} steps of latent diffusion's uniform spacing would start at timestep {train_steps}, one more than "
            f"the training has: choose {near or 'spacing quad'}"
        )
    return [t + 1 for t in timesteps(spacing, steps, train_steps)]


def _leading_fits(steps: int, train_steps: int) -> bool:
    return (train_steps - 1) % (train_steps // steps) != 0


def _squares(steps: int, train_steps: int) -> list[int]:
    return [int(root**2) for root in np.linspace(0, np.sqrt(train_steps * 0.8), steps)]


def check_eta(eta: float) -> None:
    """Raise EdadmError for a share of DDPM's noise outside of 0 to 1."""
    if not 0 <= eta <= 1:
        raise EdadmError(f"eta is {eta}: choose 0 (deterministic) to 1 (as much noise as DDPM)")


def _check_steps(steps: int, train_steps: int) -> None:
    if not 1 <= steps <= train_steps:
        raise EdadmError(f"cannot sample in {steps} steps: choose 1 to {train_steps}, the steps of the training")


@cache
def exact_betas(
    beta_schedule: str = "scaled_linear", beta_start: float = 0.0015, beta_end: float = 0.0195, train_steps: int = 1000
) -> Tensor:
    """Return the noise variances of the training steps, float64 (train_steps,); never change them in place.

    "scaled_linear" is linear in the square root, what latent diffusion calls linear. diffusers computes in float32 and
    deviates by up to 1.6e-6 in the products (golden README, ldm, 5.7 and 8.1).
    Raises EdadmError for a schedule that is not in BETA_SCHEDULES.
    """
    if beta_schedule == "linear":
        return torch.from_numpy(np.linspace(beta_start, beta_end, train_steps))
    if beta_schedule == "scaled_linear":
        return torch.from_numpy(np.linspace(beta_start**0.5, beta_end**0.5, train_steps) ** 2)
    products = alphas_cumprod(beta_schedule, beta_start, beta_end, train_steps).double()
    return 1 - products / torch.cat([products.new_ones(1), products[:-1]])


@cache
def exact_alphas_cumprod(
    beta_schedule: str = "scaled_linear", beta_start: float = 0.0015, beta_end: float = 0.0195, train_steps: int = 1000
) -> Tensor:
    """Return the product of (1 - beta) up to each training step, float64 (train_steps,); never change it in place."""
    return (1 - exact_betas(beta_schedule, beta_start, beta_end, train_steps)).cumprod(0)

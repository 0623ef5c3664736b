"""Fidelity to the full-precision model from the same noise: SQNR, PSNR and SSIM.

They measure how little quantization changes the outputs, not how good the images are. PSNR and SSIM of final images
saturate once two trajectories have parted; the noise-prediction SQNR, where both networks see the same x_t of the
full-precision trajectory, does not, and ranks methods with few images.

Equal tensors have an infinite ratio, which neither averages nor fits into a record: an image's ratio is capped at
SQNR_CAP, or for PSNR at the value of images that differ by one grey level in one entry, and a set of images without
any difference raises NotAvailable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edadm.errors import Diverged, EdadmError
from edadm.metrics.bootstrap import LEVEL, resampled_means
from edadm.metrics.frechet import NotAvailable
from edadm.metrics.images import check_images

SQNR_CAP = 150.0  # dB; float32 resolves 20 log10(2^24) = 144.5 dB
CHUNK = 250
Denoise = Callable[[torch.Tensor, torch.Tensor], Any]
"""Network call: x (B, C, H, W) and timesteps (B,) to the noise, as a tensor or as a diffusers output."""


@dataclass(frozen=True)
class StepSQNR:
    """Signal and error energy (T, N) float64 of the noise predictions at T steps for N trajectories."""

    timesteps: tuple[float, ...]
    signal: np.ndarray
    error: np.ndarray

    @property
    def values(self) -> list[float]:
        """SQNR in dB of every step, of the energies summed over the trajectories, in sampling order."""
        return [float(v) for v in decibels(self.signal.sum(1), self.error.sum(1))]

    @property
    def per_image(self) -> np.ndarray:
        """SQNR in dB (T, N) of every step and trajectory."""
        return decibels(self.signal, self.error)

    @property
    def mean(self) -> float:
        """The mean over the steps of ``values``."""
        return float(np.mean(self.values))


def decibels(signal: np.ndarray, error: np.ndarray) -> np.ndarray:
    """Return 10 log10(signal / error) in dB, float64, within [-SQNR_CAP, SQNR_CAP]; 0 / 0 is SQNR_CAP."""
    signal, error = np.asarray(signal, np.float64), np.asarray(error, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = 10 * np.log10(signal / error)
    return np.clip(np.where(error == 0, np.inf, ratio), -SQNR_CAP, SQNR_CAP)


def sqnr(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Return 10 log10(sum reference^2 / sum (reference - other)^2) in dB of two tensors of one shape, capped."""
    signal, error = _energies(reference[None], other[None])
    return float(decibels(signal, error)[0])


@torch.no_grad()
def sqnr_per_step(
    fp_denoise: Denoise,
    q_denoise: Denoise,
    trajectories_x: torch.Tensor,
    timesteps: Sequence[float] | torch.Tensor,
    batch: int = 64,
    device: torch.device | str = "cpu",
) -> StepSQNR:
    """Compare the noise predictions of two networks on the same x_t of full-precision trajectories.

    trajectories_x: (T, N, C, H, W), the inputs of the T network calls; timesteps: their T timesteps, given to the
    networks as int64, or as float64 where they are fractional. Raises Diverged naming the step at the first NaN or Inf.
    """
    visited = [int(t) if float(t).is_integer() else float(t) for t in timesteps]
    if len(trajectories_x) != len(visited):
        raise ValueError(f"{len(trajectories_x)} steps of trajectories but {len(visited)} timesteps")
    n = trajectories_x.shape[1]
    signal, error = np.zeros((len(visited), n)), np.zeros((len(visited), n))
    for step, (x_t, timestep) in enumerate(zip(trajectories_x, visited, strict=True)):
        for start in range(0, n, batch):
            rows = slice(start, start + batch)
            x = x_t[rows].to(device)
            dtype = torch.int64 if isinstance(timestep, int) else torch.float64
            t = torch.full((len(x),), timestep, device=x.device, dtype=dtype)
            signal[step, rows], error[step, rows] = _energies(_noise(fp_denoise(x, t)), _noise(q_denoise(x, t)))
        if not (np.isfinite(signal[step]).all() and np.isfinite(error[step]).all()):
            raise Diverged(f"NaN or Inf in the noise prediction at timestep {timestep} (step {step})")
    return StepSQNR(tuple(visited), signal, error)


def summary(steps: StepSQNR, rng: np.random.Generator, resamples: int = 1000, level: float = LEVEL) -> dict[str, Any]:
    """Return the SQNR as a result's entries: value (mean over the steps, dB), n, interval, and the curve over steps.

    timesteps (T,), per_step (T,) in dB and per_step_interval (T, 2); intervals are percentiles of a bootstrap over
    trajectories (None for a single one).
    """
    n = steps.signal.shape[1]
    result: dict[str, Any] = {"value": steps.mean, "n": n, "interval": None}
    result.update(timesteps=list(steps.timesteps), per_step=steps.values, per_step_interval=None)
    if n > 1:
        energies = resampled_means(np.concatenate([steps.signal, steps.error]).T, resamples, rng)
        draws = decibels(*np.split(energies, 2, axis=1))  # (resamples, T)
        tails = (1 - level) / 2, (1 + level) / 2
        result["interval"] = np.quantile(draws.mean(1), tails).tolist()
        result["per_step_interval"] = np.quantile(draws, tails, axis=0).T.tolist()
    return result


def psnr(reference: torch.Tensor, other: torch.Tensor) -> np.ndarray:
    """Return the PSNR in dB (N,) of uint8 images (N, 3, H, W) to their references, peak 255, through torchmetrics.

    Identical pairs get the value of a difference of one grey level in one entry. Raises NotAvailable when every pair is
    identical.
    """
    _check_pairs(reference, other)
    if torch.equal(reference, other):
        raise NotAvailable("all images are identical to the full-precision ones: PSNR is infinite")
    peak_signal_noise_ratio = _torchmetrics("peak_signal_noise_ratio")
    cap = 10 * math.log10(255**2 * reference[0].numel())
    parts = [
        peak_signal_noise_ratio(b.double(), a.double(), data_range=255.0, reduction="none", dim=(1, 2, 3))
        for a, b in zip(reference.split(CHUNK), other.split(CHUNK), strict=True)
    ]
    return torch.cat(parts).clamp(max=cap).cpu().numpy()


def ssim(reference: torch.Tensor, other: torch.Tensor) -> np.ndarray:
    """Return the SSIM (N,) of uint8 images (N, 3, H, W) to their references, through torchmetrics.

    Wang et al. 2004: Gaussian window of 11 x 11 and deviation 1.5, mean over the three channels. Raises NotAvailable
    for images smaller than the window.
    """
    _check_pairs(reference, other)
    if min(reference.shape[-2:]) < 11:
        raise NotAvailable(f"SSIM needs images of at least 11 x 11 pixels, got {tuple(reference.shape[-2:])}")
    structural_similarity = _torchmetrics("structural_similarity_index_measure")
    parts = [
        structural_similarity(b.float() / 255, a.float() / 255, data_range=1.0, reduction="none").reshape(-1)
        for a, b in zip(reference.split(CHUNK), other.split(CHUNK), strict=True)
    ]
    return torch.cat(parts).double().cpu().numpy()


def _noise(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _energies(reference: torch.Tensor, other: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the energies (B,) of the rows of reference and of the difference, summed in float64."""
    if reference.shape != other.shape:
        raise ValueError(f"shapes {tuple(reference.shape)} and {tuple(other.shape)} do not pair up")
    a, b = reference.double().flatten(1), other.double().flatten(1)
    return a.square().sum(1).cpu().numpy(), (a - b).square().sum(1).cpu().numpy()


def _check_pairs(reference: torch.Tensor, other: torch.Tensor) -> None:
    check_images(reference)
    check_images(other)
    if reference.shape != other.shape:
        raise ValueError(f"images of shapes {tuple(reference.shape)} and {tuple(other.shape)} do not pair up")


def _torchmetrics(name: str) -> Callable[..., torch.Tensor]:
    try:
        from torchmetrics.functional import image
    except ImportError as error:
        raise EdadmError("PSNR and SSIM need torchmetrics: pip install torchmetrics") from error
    return getattr(image, name)

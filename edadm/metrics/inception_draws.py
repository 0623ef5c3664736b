"""Inception Score and KID under resampled images, from stored features, with all that makes the reported value vary.

The Inception Score is resampled within the splits in which it is reported. KID is reported as a mean over random
subsets, so its draws are too: each takes its subsets from a resample of the images. They are of first order (the Hajek
projection of the U-statistic, Serfling 1980, section 5.3), which needs every kernel value once instead of a hundred
kernel matrices a draw, and whose mean over resamples is the value, as it is for the unbiased estimate.
"""

from __future__ import annotations

import numpy as np
import torch

from edadm.metrics.inception import IS_SPLITS, KID_SUBSET_SIZE, SEED

KID_SUBSETS = 100  # torch-fidelity's
_BLOCK = 512  # images whose kernel values are held at once


def inception_score_draws(logits: torch.Tensor, counts: np.ndarray, splits: int = IS_SPLITS) -> np.ndarray:
    """Return the mean over the splits of the Inception Score (B,) of logits (N, C) in every resample, counts (B, N).

    The splits are those of the reported score: of the images shuffled by its seed. An image stays in its split.
    """
    n = len(logits)
    order = np.random.RandomState(SEED).permutation(n)
    log_p = logits[torch.from_numpy(order)].double().log_softmax(1).numpy()
    times = counts[:, order]
    return np.mean([_score(log_p[i], times[:, i]) for i in np.split(np.arange(n), _cuts(n, splits))], axis=0)


def _cuts(n: int, splits: int) -> list[int]:
    return [i * n // splits for i in range(1, splits)]


def _score(log_p: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return exp(mean KL(p || mean p)) (B,) of the rows of log_p (N, C) counted as times (B, N) say."""
    p = np.exp(log_p)
    share = times / np.maximum(times.sum(1, keepdims=True), 1)
    marginal = share @ p
    terms = np.log(marginal, out=np.zeros_like(marginal), where=marginal > 0) * marginal
    return np.exp(share @ (p * log_p).sum(1) - terms.sum(1))


def kid_draws(
    features: torch.Tensor,
    reference: torch.Tensor,
    value: float,
    resamples: int,
    rng: np.random.Generator,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
    device: torch.device | str = "cpu",
) -> np.ndarray:
    """Return the KID (resamples,) of features (N, D) to those of reference images (M, D), around its value.

    Of every resample of the images ``subsets`` subsets are drawn, and as many of the reference, which is not resampled.
    Runs with equal N and generators have equal draws of images and subsets.
    """
    inner, outer, of_reference = _kernel_means(features, reference, device)
    own = inner - outer
    own, of_reference = own - own.mean(), of_reference - of_reference.mean()
    found = np.empty(resamples)
    for resample in range(resamples):
        images = rng.integers(len(features), size=len(features))
        drawn = images[_subsets(len(images), subsets, subset_size, rng)]
        real = _subsets(len(reference), subsets, subset_size, rng)
        found[resample] = value + 2 * (own[drawn].mean() - of_reference[real].mean())
    return found


def _subsets(n: int, subsets: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Return the members of all subsets in a row; those of one are drawn without replacement."""
    return np.concatenate([rng.choice(n, size, replace=False, shuffle=False) for _ in range(subsets)])


def _kernel_means(
    x: torch.Tensor, y: torch.Tensor, device: torch.device | str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the means of k(x_i, x_j) over j other than i (N,), of k(x_i, y_j) over j (N,) and over i (M,)."""
    x, y = x.to(device), y.to(device)
    inner, outer, of_reference = [], [], torch.zeros(len(y), dtype=torch.float64, device=x.device)
    for start in range(0, len(x), _BLOCK):
        rows = x[start : start + _BLOCK]
        every = _kernel(rows, x)
        inner.append((every.sum(1) - every.diagonal(start)) / (len(x) - 1))
        between = _kernel(rows, y)
        outer.append(between.mean(1))
        of_reference += between.sum(0) / len(x)
    return torch.cat(inner).cpu().numpy(), torch.cat(outer).cpu().numpy(), of_reference.cpu().numpy()


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return (x y^T / D + 1)^3, float64 (N, M) of float32 products (Binkowski et al. 2018)."""
    return (x @ y.T).double().div_(x.shape[1]).add_(1).pow_(3)

"""Statistics of features and the Frechet distance between two Gaussians fitted to them.

All in float64 with the unbiased covariance. The trace of (S1 S2)^(1/2) is the sum of the square roots of the
eigenvalues of R S2 R with R = S1^(1/2): it equals the eigenvalues of S1 S2 that torch-fidelity takes, but the matrix is
symmetric, so rank-deficient covariances (fewer images than features) give no complex or negative values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from edadm.errors import EdadmError

Features = torch.Tensor | np.ndarray


class NotAvailable(EdadmError):
    """A metric is not defined for this input; the message is the reason that a table shows beside n/a."""


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and unbiased covariance (D, D), float64, of n feature vectors."""

    mean: np.ndarray
    covariance: np.ndarray
    n: int


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Switch autocast, gradients and TF32 off while a feature network runs, so that features are float32 everywhere."""
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False), torch.no_grad():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution


def as_matrix(features: Features) -> np.ndarray:
    """Return features as a float64 array (N, D).

    Raises ValueError for another number of axes and for NaN or Inf.
    """
    tensor = features.detach().cpu() if isinstance(features, torch.Tensor) else features
    matrix = np.asarray(tensor, dtype=np.float64)
    if matrix.ndim != 2:
        raise ValueError(f"features have shape {matrix.shape}, expected (images, features)")
    if not np.isfinite(matrix).all():
        raise ValueError("features hold NaN or Inf: the images or the weights of the feature network are damaged")
    return matrix


class Moments:
    """Mean and scatter of feature vectors that come in chunks, in memory that does not grow with their number.

    Chunks are merged pairwise (Chan et al. 1982), which stays exact where sums of squares cancel.
    """

    def __init__(self) -> None:
        self.n = 0
        self._mean = np.zeros(0)
        self._scatter = np.zeros((0, 0))

    def add(self, features: Features) -> Moments:
        """Add features (n_i, D) and return self."""
        x = as_matrix(features)
        if len(x) == 0:
            return self
        mean = x.mean(0)
        centred = x - mean
        scatter = centred.T @ centred
        if self.n == 0:
            self.n, self._mean, self._scatter = len(x), mean, scatter
            return self
        shift, total = mean - self._mean, self.n + len(x)
        self._scatter += scatter + np.outer(shift, shift) * (self.n * len(x) / total)
        self._mean += shift * (len(x) / total)
        self.n = total
        return self

    def statistics(self) -> Statistics:
        """Return the Gaussian fitted so far. Raises NotAvailable for fewer than 2 vectors, which have no covariance."""
        if self.n < 2:
            raise NotAvailable(f"a Frechet distance needs at least 2 images, got {self.n}")
        return Statistics(self._mean.copy(), self._scatter / (self.n - 1), self.n)


def statistics(features: Features) -> Statistics:
    """Fit a Gaussian to features (N, D). Raises NotAvailable for fewer than 2 rows."""
    return Moments().add(features).statistics()


def symmetric_sqrt(matrix: np.ndarray) -> np.ndarray:
    """Return the square root of positive semi-definite matrices (..., D, D); eigenvalues below 0 count as 0."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))[..., None, :]) @ np.swapaxes(vectors, -1, -2)


def trace_of_sqrt(matrix: np.ndarray) -> float:
    """Return the trace of the square root of a positive semi-definite matrix (D, D)."""
    return float(np.sqrt(np.clip(np.linalg.eigvalsh(matrix), 0, None)).sum())


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Return |m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)) (Heusel et al. 2017, eq. 6).

    Symmetric in its arguments up to rounding. Raises ValueError when the two have different numbers of features.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"statistics of {a.mean.size} and {b.mean.size} features cannot be compared")
    root = symmetric_sqrt(a.covariance)
    difference = a.mean - b.mean
    overlap = trace_of_sqrt(root @ b.covariance @ root)
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * overlap)

"""The metrics of a run under resampled images, from which the interval of any paired difference follows.

All runs on one evaluation noise are resampled alike: image number i counts equally often in every run. What two runs
differ by in a resample is then the difference of their draws, whatever the two are, so a run is resampled once and not
once for every pair it is part of (`edadm.comparison`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from edadm.metrics import paired, tiny
from edadm.metrics.bootstrap import (
    RESAMPLES,
    ResampledStatistics,
    frechet_draws,
    resample_counts,
    resampled_statistics,
)
from edadm.metrics.frechet import NotAvailable

VERSION = 1  # of the resampling


@dataclass(frozen=True)
class Resampled:
    """A metric of n images or trajectories, and its values (B,) in the B resamples."""

    value: float
    n: int
    draws: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """What the runs on one evaluation noise share.

    fp_images: uint8 (N, 3, H, W) of the full-precision model. reference, network: of the embedded proxies, None where
    no proxy is resampled. seed: of the resampling.
    """

    fp_images: torch.Tensor
    reference: tiny.TinyReference | None
    network: tiny.TinyNetwork | None
    seed: int
    resamples: int = RESAMPLES

    def counts(self, n: int) -> np.ndarray:
        """Return how often each of n images is drawn in each resample (B, n), equal for every run."""
        return resample_counts(n, self.resamples, np.random.default_rng(self.seed))

    def features(self, images: torch.Tensor) -> tiny.TinyFeatures:
        """Return the features of uint8 images (N, 3, 32, 32)."""
        assert self.network is not None
        return tiny.extract(images, self.network)

    @cached_property
    def fp_features(self) -> tiny.TinyFeatures:
        """The features of the full-precision images."""
        return self.features(self.fp_images)

    @cached_property
    def fp_pooled(self) -> ResampledStatistics:
        """The Gaussians of their pooled features in every resample."""
        return resampled_statistics(self.fp_features.pooled, self.counts(len(self.fp_images)))

    def resample(
        self, images: torch.Tensor, names: Iterable[str], steps: paired.StepSQNR | None = None
    ) -> dict[str, Resampled]:
        """Return the metrics of one run in every resample, those of ``METRICS`` that names ask for.

        images: uint8, row by row of the same noise as fp_images. steps: of the stage ``sqnr``, for that metric. Raises
        NotAvailable for fewer than 2 images or trajectories and for a metric without a value, ValueError for images
        that do not pair up.
        """
        if images.shape != self.fp_images.shape:
            raise ValueError(f"images {tuple(images.shape)} do not pair up with {tuple(self.fp_images.shape)} of FP")
        if len(images) < 2:
            raise NotAvailable(f"an interval needs at least 2 images, got {len(images)}")
        sample = _Sample(self, images, steps)
        return {name: METRICS[name](sample) for name in names if name in METRICS}


@dataclass(frozen=True)
class _Sample:
    """The images of one run, and what its metrics share."""

    evaluation: Evaluation
    images: torch.Tensor
    steps: paired.StepSQNR | None

    @cached_property
    def counts(self) -> np.ndarray:
        return self.evaluation.counts(len(self.images))

    @cached_property
    def features(self) -> tiny.TinyFeatures:
        return self.evaluation.features(self.images)

    @cached_property
    def pooled(self) -> ResampledStatistics:
        return resampled_statistics(self.features.pooled, self.counts)

    def result(self, value: float, draws: np.ndarray) -> Resampled:
        return Resampled(value, len(self.images), draws)


def _fd_tiny(sample: _Sample) -> Resampled:
    reference = sample.evaluation.reference
    assert reference is not None
    return sample.result(tiny.fd_tiny(sample.features, reference), frechet_draws(sample.pooled, reference.pooled))


def _sfd_tiny(sample: _Sample) -> Resampled:
    reference = sample.evaluation.reference
    assert reference is not None
    spatial = resampled_statistics(sample.features.spatial, sample.counts)
    return sample.result(tiny.sfd_tiny(sample.features, reference), frechet_draws(spatial, reference.spatial))


def _fd_tiny_to_fp(sample: _Sample) -> Resampled:
    value = tiny.fd_tiny(sample.features, sample.evaluation.fp_features)
    return sample.result(value, frechet_draws(sample.pooled, sample.evaluation.fp_pooled))


def _is_tiny(sample: _Sample) -> Resampled:
    log_p = sample.features.logits.double().log_softmax(1).numpy()
    p = np.exp(log_p)
    marginal = _means(sample, p)
    divergence = _means(sample, (p * log_p).sum(1)) - (marginal * np.log(marginal)).sum(1)
    return sample.result(tiny.is_tiny(sample.features), np.exp(divergence))


def _sqnr(sample: _Sample) -> Resampled:
    steps = sample.steps
    if steps is None or steps.signal.shape[1] < 2:
        raise NotAvailable("an interval of the SQNR needs the errors of at least 2 trajectories")
    n = steps.signal.shape[1]
    counts = sample.evaluation.counts(n)
    per_step = paired.decibels(counts @ steps.signal.T, counts @ steps.error.T)  # (B, T)
    return Resampled(steps.mean, n, per_step.mean(1))


def _psnr(sample: _Sample) -> Resampled:
    values = paired.psnr(sample.evaluation.fp_images, sample.images)
    return sample.result(float(values.mean()), _means(sample, values))


def _ssim(sample: _Sample) -> Resampled:
    values = paired.ssim(sample.evaluation.fp_images, sample.images)
    return sample.result(float(values.mean()), _means(sample, values))


def _means(sample: _Sample, values: np.ndarray) -> np.ndarray:
    """Return the means of values (N, ...) in every resample."""
    return sample.counts @ values / len(sample.images)


METRICS: dict[str, Callable[[_Sample], Resampled]] = {
    "fd_tiny": _fd_tiny,
    "sfd_tiny": _sfd_tiny,
    "is_tiny": _is_tiny,
    "fd_tiny_to_fp": _fd_tiny_to_fp,
    "sqnr": _sqnr,
    "psnr": _psnr,
    "ssim": _ssim,
}

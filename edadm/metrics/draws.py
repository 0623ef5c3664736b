"""The metrics of a run under resampled images, from which the interval of any paired difference follows.

All runs on one evaluation noise are resampled alike: image number i counts equally often in every run. What two runs
differ by in a resample is then the difference of their draws, whatever the two are, so a run is resampled once and not
once for every pair it is part of (`edadm.comparison`).

The embedded proxies, PSNR and SSIM are measured again from the images. What takes a large network comes from features
that the run kept (``KEPT``). A resample of 2,048 features costs seconds, so their Frechet distances have fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from edadm.metrics import inception, paired, tiny
from edadm.metrics.bootstrap import (
    RESAMPLES,
    ResampledStatistics,
    frechet_draws,
    frechet_draws_between,
    resample_counts,
    resampled_statistics,
)
from edadm.metrics.frechet import NotAvailable, Statistics
from edadm.metrics.inception_draws import inception_score_draws, kid_draws
from edadm.metrics.references import FeatureReference

VERSION = 1  # of the resampling
LARGE_RESAMPLES = 50  # of Frechet distances of kept features

KEPT = {
    "fid": "inception.pooled",
    "sfid": "inception.spatial",
    "is": "inception.logits",
    "kid": "inception.pooled",
    "fd_dinov2": "dinov2",
    "clip": "clip",
    "clip_tiny": "clip_tiny",
    "aesthetic": "aesthetic",
}
"""The array with a row for every image, kept by ``scoring.score``, that a metric is resampled from."""


@dataclass(frozen=True)
class Resampled:
    """A metric of n images or trajectories, and its values (B,) in the B resamples."""

    value: float
    n: int
    draws: np.ndarray


@dataclass(frozen=True)
class Evaluation:
    """What the runs on one evaluation noise share.

    fp_images: uint8 (N, 3, H, W) of the full-precision model. reference, network: of the embedded proxies; inception,
    dinov2: references of those metrics; None where none of them is resampled. seed: of the resampling. device: where
    kept features are resampled.
    """

    fp_images: torch.Tensor
    reference: tiny.TinyReference | None
    network: tiny.TinyNetwork | None
    seed: int
    resamples: int = RESAMPLES
    inception: FeatureReference | None = None
    dinov2: FeatureReference | None = None
    device: str = "cpu"

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
        self,
        images: torch.Tensor,
        names: Iterable[str],
        steps: paired.StepSQNR | None = None,
        kept: Mapping[str, np.ndarray] | None = None,
    ) -> dict[str, Resampled]:
        """Return the metrics of one run in every resample, those of ``METRICS`` that names ask for.

        images: uint8, row by row of the same noise as fp_images. steps: of the stage ``sqnr``, for that metric. kept:
        what the run kept of every image, by the names of ``KEPT``. Raises NotAvailable for fewer than 2 images or
        trajectories and for a metric without a value, ValueError for images that do not pair up, KeyError for a metric
        of which nothing was kept.
        """
        if images.shape != self.fp_images.shape:
            raise ValueError(f"images {tuple(images.shape)} do not pair up with {tuple(self.fp_images.shape)} of FP")
        if len(images) < 2:
            raise NotAvailable(f"an interval needs at least 2 images, got {len(images)}")
        sample = _Sample(self, images, steps, kept or {})
        return {name: METRICS[name](sample) for name in names if name in METRICS}


@dataclass(frozen=True)
class _Sample:
    """The images of one run, and what its metrics share."""

    evaluation: Evaluation
    images: torch.Tensor
    steps: paired.StepSQNR | None
    kept: Mapping[str, np.ndarray]

    def rows(self, name: str) -> np.ndarray:
        """Return what was kept for a metric, a row for every image."""
        found = self.kept[KEPT[name]]
        if len(found) != len(self.images):
            raise ValueError(f"{len(found)} rows kept for {name} do not pair up with {len(self.images)} images")
        return found

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
    draws = frechet_draws(sample.features.pooled, reference.pooled, sample.counts)
    return sample.result(tiny.fd_tiny(sample.features, reference), draws)


def _sfd_tiny(sample: _Sample) -> Resampled:
    reference = sample.evaluation.reference
    assert reference is not None
    draws = frechet_draws(sample.features.spatial, reference.spatial, sample.counts)
    return sample.result(tiny.sfd_tiny(sample.features, reference), draws)


def _fd_tiny_to_fp(sample: _Sample) -> Resampled:
    value = tiny.fd_tiny(sample.features, sample.evaluation.fp_features)
    return sample.result(value, frechet_draws_between(sample.pooled, sample.evaluation.fp_pooled))


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


def _fid(sample: _Sample) -> Resampled:
    assert sample.evaluation.inception is not None
    return _large(sample, "fid", sample.evaluation.inception.pooled)


def _sfid(sample: _Sample) -> Resampled:
    reference = sample.evaluation.inception
    assert reference is not None and reference.spatial is not None
    return _large(sample, "sfid", reference.spatial)


def _fd_dinov2(sample: _Sample) -> Resampled:
    assert sample.evaluation.dinov2 is not None
    return _large(sample, "fd_dinov2", sample.evaluation.dinov2.pooled)


def _large(sample: _Sample, name: str, reference: Statistics) -> Resampled:
    """Resample the Frechet distance of kept features; its value is that of every image drawn once."""
    whole = np.ones((1, len(sample.images)))
    counts = np.concatenate([whole, sample.counts[:LARGE_RESAMPLES]])
    value, *draws = frechet_draws(sample.rows(name), reference, counts, sample.evaluation.device)
    return sample.result(float(value), np.array(draws))


def _is(sample: _Sample) -> Resampled:
    logits = torch.from_numpy(sample.rows("is"))
    (value,) = inception_score_draws(logits, np.ones((1, len(logits))))
    return sample.result(float(value), inception_score_draws(logits, sample.counts))


def _kid(sample: _Sample) -> Resampled:
    reference, evaluation = sample.evaluation.inception, sample.evaluation
    assert reference is not None and reference.features is not None
    features = inception.InceptionFeatures(*(torch.from_numpy(sample.rows(name)) for name in ("kid", "sfid", "is")))
    value, _ = inception.kid(features, reference)
    rng = np.random.default_rng(evaluation.seed)
    draws = kid_draws(features.pooled, reference.features, value, evaluation.resamples, rng, device=evaluation.device)
    return sample.result(value, draws)


def _mean_of(name: str) -> Callable[[_Sample], Resampled]:
    def resampled(sample: _Sample) -> Resampled:
        values = sample.rows(name)
        return sample.result(float(values.mean()), _means(sample, values))

    return resampled


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
    "fid": _fid,
    "sfid": _sfid,
    "is": _is,
    "kid": _kid,
    "fd_dinov2": _fd_dinov2,
    **{name: _mean_of(name) for name in ("clip", "clip_tiny", "aesthetic")},
}

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch

from edadm.comparison import RESAMPLED
from edadm.metrics import draws, inception, paired, tiny
from edadm.metrics.draws import Evaluation
from edadm.metrics.frechet import NotAvailable, frechet_distance, statistics
from edadm.metrics.references import FeatureReference
from edadm.metrics.registry import METRICS

from .conftest import random_images
from .test_inception import frechet_by_singular_values

PROXIES = ["fd_tiny", "sfd_tiny", "is_tiny", "fd_tiny_to_fp"]


@pytest.fixture(scope="module")
def evaluation(tiny_network) -> Evaluation:
    reference = tiny.build_reference(random_images(300), tiny_network, "patterns")
    return Evaluation(random_images(40, seed=1), reference, tiny_network, seed=7, resamples=6)


@pytest.fixture(scope="module")
def images(evaluation) -> torch.Tensor:
    return tiny.jpeg(evaluation.fp_images, 30)


def repeated(images: torch.Tensor, evaluation: Evaluation, resample: int) -> torch.Tensor:
    times = torch.from_numpy(evaluation.counts(len(images))[resample].astype(int))
    return images.repeat_interleave(times, 0)


def test_reports_know_which_metrics_are_resampled():
    assert tuple(draws.METRICS) == RESAMPLED


def test_a_draw_of_a_proxy_is_its_value_for_the_drawn_images(evaluation, images, tiny_network):
    found = evaluation.resample(images, PROXIES)
    features = tiny.extract(repeated(images, evaluation, 2), tiny_network)
    fp = tiny.extract(repeated(evaluation.fp_images, evaluation, 2), tiny_network)
    expected = {
        "fd_tiny": tiny.fd_tiny(features, evaluation.reference),
        "sfd_tiny": tiny.sfd_tiny(features, evaluation.reference),
        "is_tiny": tiny.is_tiny(features),
        "fd_tiny_to_fp": frechet_distance(statistics(features.pooled), statistics(fp.pooled)),
    }
    for name, value in expected.items():
        # fewer images than features: eigenvalues that are 0 up to rounding enter as their square roots
        assert found[name].draws[2] == pytest.approx(value, rel=1e-4), name
        assert (found[name].n, len(found[name].draws)) == (40, 6)


def test_values_are_those_of_the_whole_set(evaluation, images, tiny_network):
    found = evaluation.resample(images, [*PROXIES, "psnr", "ssim"])
    features = tiny.extract(images, tiny_network)
    assert found["fd_tiny"].value == tiny.fd_tiny(features, evaluation.reference)
    assert found["is_tiny"].value == tiny.is_tiny(features)
    assert found["psnr"].value == pytest.approx(paired.psnr(evaluation.fp_images, images).mean())


def test_a_draw_of_a_mean_is_the_mean_of_the_drawn_images(evaluation, images):
    found = evaluation.resample(images, ["psnr", "ssim"])
    drawn, fp = repeated(images, evaluation, 4), repeated(evaluation.fp_images, evaluation, 4)
    assert found["psnr"].draws[4] == pytest.approx(paired.psnr(fp, drawn).mean())
    assert found["ssim"].draws[4] == pytest.approx(paired.ssim(fp, drawn).mean(), rel=1e-6)


def test_the_sqnr_is_resampled_over_trajectories_step_by_step(evaluation, images):
    error = np.array([[1.0, 2.0, 4.0], [1.0, 1.0, 10.0]])  # (steps, trajectories)
    steps = paired.StepSQNR((5, 0), np.full((2, 3), 100.0), error)
    found = evaluation.resample(images, ["sqnr"], steps)["sqnr"]
    counts = evaluation.counts(3)[1]
    by_hand = np.mean([10 * np.log10(300 / (counts * row).sum()) for row in error])
    assert (found.n, found.value) == (3, steps.mean)
    assert found.draws[1] == pytest.approx(by_hand)


@pytest.fixture(scope="module")
def kept() -> dict[str, np.ndarray]:
    """What a run of 40 images kept of them, of few features."""
    generator = np.random.default_rng(5)
    sizes = {"inception.pooled": 6, "inception.spatial": 5, "inception.logits": 4, "dinov2": 3}
    found = {name: generator.random((40, size), dtype=np.float32) for name, size in sizes.items()}
    return found | {name: generator.random(40) for name in ("clip", "clip_tiny", "aesthetic")}


@pytest.fixture(scope="module")
def against_features(evaluation, kept) -> Evaluation:
    """The evaluation with references for kept features: those of other images."""
    other = {name: torch.from_numpy(rows + 0.1) for name, rows in kept.items() if rows.ndim == 2}
    pooled = other["inception.pooled"]
    reference = FeatureReference(statistics(pooled), statistics(other["inception.spatial"]), pooled, 40, "other", None)
    dinov2 = FeatureReference(statistics(other["dinov2"]), None, None, 40, "other", None)
    return dataclasses.replace(evaluation, inception=reference, dinov2=dinov2)


def test_every_metric_is_resampled_from_the_images_or_from_what_is_kept(evaluation):
    assert {"fid", "sfid", "is", "kid", "clip", "clip_tiny", "aesthetic", "fd_dinov2"} == draws.KEPT.keys()
    assert draws.KEPT.keys() <= draws.METRICS.keys() <= METRICS.keys()


def test_a_draw_of_kept_features_is_its_value_for_the_drawn_images(against_features, images, kept):
    found = against_features.resample(images, ["fid", "sfid", "is", "fd_dinov2"], kept=kept)
    times = against_features.counts(40)[2].astype(int)
    drawn = {name: torch.from_numpy(np.repeat(rows, times, axis=0)) for name, rows in kept.items()}
    seen = {"fid": "inception.pooled", "sfid": "inception.spatial", "fd_dinov2": "dinov2"}
    real = against_features.inception
    against = {"fid": real.pooled, "sfid": real.spatial, "fd_dinov2": against_features.dinov2.pooled}
    for name, rows in seen.items():
        assert found[name].draws[2] == pytest.approx(frechet_distance(statistics(drawn[rows]), against[name]))
        value = frechet_distance(statistics(kept[rows]), against[name])
        assert found[name].value == pytest.approx(value, rel=1e-6)
        assert (found[name].n, len(found[name].draws)) == (40, 6)
    logits = torch.from_numpy(kept["inception.logits"])
    features = inception.InceptionFeatures(logits, logits, logits)
    assert found["is"].value == pytest.approx(inception.inception_score(features)[0])


def test_frechet_distances_of_many_features_have_fewer_draws(against_features, images, kept):
    many = dataclasses.replace(against_features, resamples=draws.LARGE_RESAMPLES + 10)
    found = many.resample(images, ["fid", "is", "clip"], kept=kept)
    assert [len(found[name].draws) for name in ("fid", "is", "clip")] == [
        draws.LARGE_RESAMPLES,
        many.resamples,
        many.resamples,
    ]
    np.testing.assert_allclose(found["clip"].draws, many.counts(40) @ kept["clip"] / 40)
    assert found["clip"].value == kept["clip"].mean()


def test_equal_features_of_two_runs_have_no_difference_in_any_draw(against_features, images, kept):
    names = ["fid", "is", "kid"]
    resample = partial(against_features.resample, images, names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "kid", lambda features, reference: (0.25, 0.0))  # it needs a thousand images
        patch.setattr(draws, "kid_draws", partial(draws.kid_draws, subset_size=10))
        one, two = resample(kept=kept), resample(kept=dict(kept))
    for name in names:
        np.testing.assert_array_equal(one[name].draws, two[name].draws)
        assert one[name].draws.std() > 0
    assert one["kid"].value == 0.25


def test_features_of_other_images_and_of_none_are_refused(against_features, images, kept):
    with pytest.raises(ValueError, match="3 rows kept for clip do not pair up with 40 images"):
        against_features.resample(images, ["clip"], kept={"clip": np.zeros(3)})
    with pytest.raises(KeyError, match="clip"):
        against_features.resample(images, ["clip"])


@pytest.mark.slow
def test_inceptions_features_are_resampled_as_they_are(inception_network):
    """With the 2,048 features of a network of random weights and fewer images than features."""
    one, two, real = (inception.extract(random_images(8, 16, seed), inception_network) for seed in range(3))
    reference = FeatureReference(statistics(real.pooled), None, None, 8, "patterns", None)
    evaluation = Evaluation(random_images(8, 16), None, None, 0, resamples=2, inception=reference)
    for features in (one, two):
        found = evaluation.resample(evaluation.fp_images, ["fid"], kept={"inception.pooled": features.pooled.numpy()})
        times = torch.from_numpy(evaluation.counts(8)[1].astype(int))
        drawn = features.pooled.repeat_interleave(times, 0)
        assert found["fid"].draws[1] == pytest.approx(frechet_by_singular_values(drawn, real.pooled), rel=1e-5)
        assert found["fid"].value == pytest.approx(frechet_by_singular_values(features.pooled, real.pooled), rel=1e-5)


def test_equal_runs_have_equal_draws_whatever_else_is_asked(evaluation, images):
    alone, among = evaluation.resample(images, ["psnr"]), evaluation.resample(images, ["ssim", "psnr"])
    np.testing.assert_array_equal(alone["psnr"].draws, among["psnr"].draws)
    assert list(evaluation.resample(images, ["precision", "psnr"])) == ["psnr"]


def test_what_cannot_be_resampled_says_why(evaluation, images):
    with pytest.raises(ValueError, match="do not pair up"):
        evaluation.resample(images[:3], ["psnr"])
    with pytest.raises(NotAvailable, match="at least 2 trajectories"):
        evaluation.resample(images, ["sqnr"])
    one = Evaluation(images[:1], None, None, 0)
    with pytest.raises(NotAvailable, match="at least 2 images, got 1"):
        one.resample(images[:1], ["psnr"])

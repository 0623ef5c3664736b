from __future__ import annotations

import numpy as np
import pytest
import torch

from edadm.comparison import RESAMPLED
from edadm.metrics import draws, paired, tiny
from edadm.metrics.draws import Evaluation
from edadm.metrics.frechet import NotAvailable, frechet_distance, statistics

from .conftest import random_images

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


def test_equal_runs_have_equal_draws_whatever_else_is_asked(evaluation, images):
    alone, among = evaluation.resample(images, ["psnr"]), evaluation.resample(images, ["ssim", "psnr"])
    np.testing.assert_array_equal(alone["psnr"].draws, among["psnr"].draws)
    assert list(evaluation.resample(images, ["fid", "psnr"])) == ["psnr"]


def test_what_cannot_be_resampled_says_why(evaluation, images):
    with pytest.raises(ValueError, match="do not pair up"):
        evaluation.resample(images[:3], ["psnr"])
    with pytest.raises(NotAvailable, match="at least 2 trajectories"):
        evaluation.resample(images, ["sqnr"])
    one = Evaluation(images[:1], None, None, 0)
    with pytest.raises(NotAvailable, match="at least 2 images, got 1"):
        one.resample(images[:1], ["psnr"])

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from edadm.metrics.frechet import Moments, NotAvailable, Statistics, frechet_distance, full_float32, statistics


def features(n: int, d: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + rng.standard_normal(d)


def test_statistics_are_those_of_numpy():
    x = features(50, 6)
    found = statistics(torch.from_numpy(x))
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(x, rowvar=False), rtol=1e-11)
    assert found.n == 50


@pytest.mark.parametrize("sizes", [(50,), (1, 49), (20, 0, 30), (17, 17, 16)])
def test_moments_do_not_depend_on_chunks(sizes):
    x = features(50, 6) + 1e4  # a large mean: sums of squares would cancel
    moments = Moments()
    for chunk in np.split(x, np.cumsum(sizes)[:-1]):
        moments.add(chunk)
    np.testing.assert_allclose(moments.statistics().covariance, np.cov(x, rowvar=False), rtol=1e-8)
    np.testing.assert_allclose(moments.statistics().mean, x.mean(0), rtol=1e-13)


def test_distance_of_one_dimensional_gaussians_is_the_closed_form():
    a = Statistics(np.array([1.0]), np.array([[4.0]]), 10)
    b = Statistics(np.array([3.0]), np.array([[9.0]]), 10)
    assert frechet_distance(a, b) == pytest.approx((1 - 3) ** 2 + (2 - 3) ** 2)


def test_distance_equals_the_matrix_square_root():
    a, b = statistics(features(60, 8, 1)), statistics(features(70, 8, 2))
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    shift = a.mean - b.mean
    expected = shift @ shift + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)


def test_distance_equals_torch_fidelity():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = features(40, 12, 3), features(40, 12, 4)
    official = fid_statistics_to_metric(
        *(fid_features_to_statistics(torch.from_numpy(v)) for v in (x, y)), verbose=False
    )["frechet_inception_distance"]
    assert frechet_distance(statistics(x), statistics(y)) == pytest.approx(official, rel=1e-9)


def test_fewer_images_than_features_gives_a_finite_distance():
    a, b = statistics(features(5, 12, 1)), statistics(features(60, 12, 2))
    assert np.isfinite(frechet_distance(a, b))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)  # square roots of eigenvalues of about 1e-14


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_images_are_not_available(n):
    with pytest.raises(NotAvailable, match=f"at least 2 images, got {n}"):
        statistics(np.zeros((n, 3)))


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match="NaN or Inf"):
        statistics(np.array([[0.0, np.nan], [1.0, 2.0]]))
    with pytest.raises(ValueError, match="shape"):
        statistics(np.zeros(3))
    with pytest.raises(ValueError, match="cannot be compared"):
        frechet_distance(statistics(np.eye(3)), statistics(np.eye(4)))


def test_full_float32_restores_the_callers_settings():
    before = torch.backends.cudnn.allow_tf32
    with pytest.raises(RuntimeError), full_float32(torch.device("cpu")):
        assert not torch.backends.cudnn.allow_tf32 and not torch.is_grad_enabled()
        raise RuntimeError
    assert torch.backends.cudnn.allow_tf32 == before and torch.is_grad_enabled()

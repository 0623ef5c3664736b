from __future__ import annotations

import numpy as np
import pytest
import torch

from edadm.metrics.bootstrap import (
    frechet_difference,
    frechet_draws,
    frechet_draws_between,
    frechet_infinity,
    mean_interval,
    resample_counts,
    resampled_means,
    resampled_statistics,
)
from edadm.metrics.frechet import NotAvailable, Statistics, frechet_distance, statistics, symmetric_sqrt

D = 12


@pytest.fixture
def reference(rng) -> Statistics:
    root = rng.standard_normal((D, D)) / np.sqrt(D)
    return Statistics(rng.standard_normal(D), root @ root.T, 50_000)


def draw(reference: Statistics, n: int, rng: np.random.Generator, spread: float, noise: float):
    """Features of a perfect generator and of a damaged one that started from the same noise."""
    fp = rng.standard_normal((n, D)) @ symmetric_sqrt(reference.covariance) + reference.mean
    damaged = (fp - reference.mean) * spread + reference.mean + noise * rng.standard_normal((n, D))
    return damaged, fp


def test_counts_sum_to_the_number_of_images(rng):
    counts = resample_counts(7, 40, rng)
    assert counts.shape == (40, 7)
    assert (counts.sum(1) == 7).all()


@pytest.mark.parametrize("n", [50, 8])  # more and fewer images than features
def test_resamples_equal_the_repeated_rows(rng, reference, n):
    x, fp = draw(reference, n, rng, 1.2, 0.1)
    counts = resample_counts(n, 3, rng)
    resampled, resampled_fp = resampled_statistics(x, counts), resampled_statistics(fp, counts)
    to_reference = frechet_draws(torch.from_numpy(x).float(), reference, counts)
    to_fp = frechet_draws_between(resampled, resampled_fp)
    for number, times in enumerate(counts.astype(int)):
        repeated, repeated_fp = (statistics(np.repeat(z, times, axis=0)) for z in (x, fp))
        np.testing.assert_allclose(resampled.mean[number], repeated.mean)
        np.testing.assert_allclose(resampled.covariance[number], repeated.covariance, atol=1e-12)
        # rel: with fewer images than features, eigenvalues that are 0 up to 1e-16 enter as their square roots
        assert to_reference[number] == pytest.approx(frechet_distance(reference, repeated), rel=1e-5)  # float32 rows
        assert to_fp[number] == pytest.approx(frechet_distance(repeated_fp, repeated), rel=1e-6)


def test_equal_seeds_give_equal_intervals(rng, reference):
    a, b = draw(reference, 60, rng, 1.1, 0.1)
    first, second = (frechet_difference(a, b, reference, np.random.default_rng(3), 20) for _ in range(2))
    assert first == second


def test_equal_images_have_no_difference(rng, reference):
    _, fp = draw(reference, 60, rng, 1, 0)
    found = frechet_difference(fp, fp, reference, rng, 20)
    assert (found.at_n.value, found.at_n.low, found.at_n.high) == (0, 0, 0)
    assert found.corrected.value == 0


def test_intervals_hold_the_value_and_shrink_with_n(rng, reference):
    small, large = (frechet_difference(*draw(reference, n, rng, 1.1, 0.2), reference, rng, 100) for n in (100, 1600))
    for found in (small, large):
        assert found.at_n.low < found.at_n.value < found.at_n.high
        assert found.corrected.low < found.corrected.value < found.corrected.high
    assert large.at_n.high - large.at_n.low < (small.at_n.high - small.at_n.low) / 2  # 1/4 expected


def test_corrected_interval_covers_the_true_difference(rng, reference):
    spread, noise, trials = 1.1, 0.1, 40
    truth = frechet_distance(
        reference, Statistics(reference.mean, spread**2 * reference.covariance + noise**2 * np.eye(D), 1)
    )
    hits = 0
    for _ in range(trials):
        a, b = draw(reference, 150, rng, spread, noise)
        found = frechet_difference(a, b, reference, rng, 100).corrected
        hits += found.low <= truth <= found.high
    assert hits >= 0.85 * trials  # nominal 0.95; below 0.85 of 40 has probability under 1 %


def test_unpaired_features_are_refused(rng, reference):
    a, b = draw(reference, 20, rng, 1, 0)
    with pytest.raises(ValueError, match="same noise"):
        frechet_difference(a, b[:10], reference, rng)
    with pytest.raises(NotAvailable, match="at least 2"):
        frechet_difference(a[:1], b[:1], reference, rng)


def test_mean_interval_has_the_standard_error_of_the_mean(rng):
    values = rng.standard_normal(400)
    found = mean_interval(values, rng, resamples=2000)
    assert found.value == values.mean()
    half = 1.96 * values.std(ddof=1) / np.sqrt(400)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)
    with pytest.raises(NotAvailable, match="at least 2 images, got 1"):
        mean_interval(values[:1], rng)


def test_resampled_means_do_not_depend_on_the_block(rng):
    values = rng.standard_normal((9, 3))
    one, many = (resampled_means(values, 25, np.random.default_rng(1), block) for block in (25, 7))
    np.testing.assert_allclose(one, many)
    assert one.shape == (25, 3)


def test_extrapolation_lies_below_the_level_whatever_the_subsets(rng, reference):
    _, fp = draw(reference, 400, rng, 1, 0)
    level = frechet_distance(reference, statistics(fp))
    many, one = (
        [frechet_infinity(fp, reference, np.random.default_rng(seed), subsets=subsets) for seed in range(20)]
        for subsets in (20, 1)
    )
    assert max(many) < level
    assert np.std(many) < np.std(one) / 3


def test_extrapolation_is_the_intercept_of_distances_in_the_reciprocal_of_n(rng, reference):
    _, fp = draw(reference, 200, rng, 1, 0)
    again, shuffled = np.random.default_rng(3), []
    for size in (50, 125, 200):
        shuffled.append(frechet_distance(statistics(fp[again.permutation(200)[:size]]), reference))
    slope, intercept = np.polyfit([1 / 50, 1 / 125, 1 / 200], shuffled, 1)
    found = frechet_infinity(fp, reference, np.random.default_rng(3), points=3, subsets=1)
    assert slope > 0
    assert found == pytest.approx(intercept)


def test_extrapolation_removes_most_of_the_bias_of_few_images(rng, reference):
    _, fp = draw(reference, 400, rng, 1, 0)  # the true distance is 0
    level = frechet_distance(reference, statistics(fp))
    assert abs(frechet_infinity(fp, reference, rng)) < level / 2
    with pytest.raises(NotAvailable, match=f"at least {2 * (D + 1)} images, got 20"):
        frechet_infinity(fp[:20], reference, rng)

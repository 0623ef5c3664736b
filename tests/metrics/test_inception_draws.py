from __future__ import annotations

import numpy as np
import pytest
import torch

from edadm.metrics import inception_draws
from edadm.metrics.bootstrap import resample_counts
from edadm.metrics.inception import InceptionFeatures, inception_score, kid
from edadm.metrics.inception_draws import inception_score_draws, kid_draws
from edadm.metrics.references import FeatureReference


@pytest.mark.parametrize("n", [40, 43])  # splits of equal and of unequal size
def test_every_image_once_gives_the_reported_inception_score(rng, n):
    logits = torch.from_numpy(3 * rng.standard_normal((n, 5)).astype(np.float32))
    expected, _ = inception_score(InceptionFeatures(logits, logits, logits))
    assert inception_score_draws(logits, np.ones((1, n))) == pytest.approx(expected)


def test_a_resample_counts_the_images_of_each_split(rng):
    logits = torch.from_numpy(3 * rng.standard_normal((12, 5)).astype(np.float32))
    counts = resample_counts(12, 3, rng)
    order = np.random.RandomState(2020).permutation(12)
    p = logits.double().softmax(1).numpy()
    by_hand = []
    for members in np.split(order, 3):
        drawn = np.repeat(p[members], counts[1][members].astype(int), axis=0)
        by_hand.append(np.exp((drawn * np.log(drawn / drawn.mean(0))).sum(1).mean()))
    assert inception_score_draws(logits, counts, splits=3)[1] == pytest.approx(np.mean(by_hand))


def test_a_split_that_loses_all_its_images_scores_one(rng):
    logits = torch.from_numpy(rng.standard_normal((4, 5)))
    assert inception_score_draws(logits, np.zeros((1, 4)), splits=2) == 1


def sample(rng: np.random.Generator, n: int, shift: float) -> torch.Tensor:
    return torch.from_numpy((rng.uniform(-1, 1, (n, 3)) + shift).astype(np.float32))


def test_kernel_means_are_those_of_all_pairs(rng, monkeypatch):
    monkeypatch.setattr(inception_draws, "_BLOCK", 3)
    x, y = sample(rng, 8, 0.5), sample(rng, 10, 0.0)
    kernel = lambda a, b: (a.double() @ b.double().T / 3 + 1) ** 3
    inner, outer, of_reference = inception_draws._kernel_means(x, y, "cpu")
    others = kernel(x, x).fill_diagonal_(0).sum(1) / 7
    np.testing.assert_allclose(inner, others, rtol=1e-5)
    np.testing.assert_allclose(outer, kernel(x, y).mean(1), rtol=1e-5)
    np.testing.assert_allclose(of_reference, kernel(x, y).mean(0), rtol=1e-5)


def test_draws_of_kid_vary_as_kid_does_from_one_set_of_images_to_another(rng):
    """The difference of two damaged generators on the same noise, whose subsets are those of torch-fidelity's seed."""
    n, subsets, size, reference = 150, 100, 30, sample(rng, 150, 0.0)

    def value(features: torch.Tensor) -> float:
        real = FeatureReference(None, None, reference, n, "", None)  # type: ignore[arg-type]
        return kid(InceptionFeatures(features, features, features), real, subset_size=size)[0]

    measured, spread = [], []
    for trial in range(60):
        x = sample(rng, n, 0.3)
        pair = x, x + 0.15 + 0.3 * sample(rng, n, 0.0)
        values = [value(features) for features in pair]
        measured.append(values[0] - values[1])
        if trial % 10 == 0:
            first, second = (
                kid_draws(features, reference, found, 60, np.random.default_rng(0), subsets, size)
                for features, found in zip(pair, values, strict=True)
            )
            spread.append(np.std(first - second))
            assert np.mean(first - second) == pytest.approx(measured[-1], abs=4 * spread[-1] / 60**0.5)
    # measured at 200 trials: 1.04; the deviation of 60 trials is known within 9 %
    assert 0.75 < np.mean(spread) / np.std(measured) < 1.4

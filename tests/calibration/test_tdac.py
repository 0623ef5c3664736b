from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from edadm.calibration.tdac import TDAC, density, shares, variety
from edadm.calibration.trajectories import Trajectories
from edadm.errors import EdadmError
from edadm.sampling.noise import SELECTION, numpy_rng
from tests.toys import CountLarge


def official_scores(features: torch.Tensor, r: float) -> tuple[list[int], torch.Tensor]:
    """The double loop of golden README 5.2."""
    near, apart = [0] * len(features), torch.zeros(len(features), dtype=torch.float64)
    cosine = torch.nn.CosineSimilarity(dim=1, eps=1e-6)
    for i, first in enumerate(features):
        for j, second in enumerate(features):
            if i != j:
                near[i] += bool((first - second).square().mean() <= r)
                apart[i] += (1 - cosine(first.double(), second.double())).sum()
    return near, apart


def walk(steps=12, shape=(4, 8, 3, 3), seed=0, scale=1.0, offset=0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, *shape, generator=generator).cumsum(0) * scale + offset


@pytest.mark.parametrize("shape", [(4, 8, 3, 3), (1, 5, 1, 1), (3, 7, 50), (2, 6), (1, 64, 16, 16)])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-3, 0.0), (0.1, 300.0)])
def test_scores_equal_the_double_loop(shape, scale, offset):
    features = walk(shape=shape, scale=scale, offset=offset)
    pairs = [(a - b).square().mean() for i, a in enumerate(features) for b in features[i + 1 :]]
    for r in torch.stack(pairs).quantile(torch.tensor([0.0, 0.3, 0.7])).tolist():
        near, apart = official_scores(features, r)
        assert density(features, r)[0].tolist() == near
        torch.testing.assert_close(variety(features), apart, rtol=1e-9, atol=1e-9 * features[0].numel())


def test_every_pair_as_threshold_counts_itself_exactly():
    """A distance that is the threshold counts as near, though the Gram matrix may round it to the other side."""
    features = walk(steps=20, offset=50.0)
    for i in range(20):
        for j in range(i):
            r = float((features[i] - features[j]).square().mean())
            assert density(features, r)[0].tolist() == official_scores_density(features, r)


def official_scores_density(features: torch.Tensor, r: float) -> list[int]:
    return [sum(bool((a - b).square().mean() <= r) for b in features) - 1 for a in features]


@pytest.mark.parametrize("steps", [4, 5, 7, 12])  # 6, 10, 21, 66 pairs: the median is a pair or lies between two
def test_the_default_threshold_is_the_median_distance(steps):
    features = walk(steps)
    i, j = torch.triu_indices(steps, steps, offset=1)
    median = float(np.median((features[i] - features[j]).square().flatten(1).mean(1).double()))
    near, r = density(features)
    assert r == pytest.approx(median, rel=1e-6)
    assert near.sum() == 2 * -(-len(i) // 2)


def test_equal_features_are_at_distance_zero():
    features = walk(steps=8, offset=10.0)
    features[2:] = features[2]
    near, r = density(features)  # 15 of 28 pairs are equal
    assert r == 0 and near.tolist() == [0, 0, 5, 5, 5, 5, 5, 5]


def test_a_zero_norm_counts_as_unlike_everything():
    features = torch.ones(3, 1, 4, 1)
    features[0] = 0
    assert variety(features).tolist() == pytest.approx([2, 1, 1])


def test_shares_follow_the_formula():
    share = shares(torch.tensor([0, 1, 2]), torch.tensor([5.0, 3.0, 4.0]), 2.0)
    assert share.tolist() == pytest.approx([2 / 4.5, 0.5 / 4.5, 2 / 4.5])


def test_a_constant_density_counts_as_nothing_and_is_reported(caplog):
    with caplog.at_level(logging.WARNING):
        share = shares(torch.tensor([2, 2, 2]), torch.tensor([1.0, 2.0, 3.0]), 1.2)
    assert share.tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    assert "density is the same (2)" in caplog.text


def test_a_constant_variety_counts_as_nothing(caplog):
    share = shares(torch.tensor([0, 2, 2]), torch.tensor([1.0, 1.0, 1.0]), 1.2)
    assert share.tolist() == pytest.approx([0, 0.5, 0.5])
    assert "variety is the same" in caplog.text


@pytest.mark.parametrize("n", [5, 7, 10])
def test_identical_features_give_uniform_counts_and_a_warning(n, caplog):
    one = walk(1, shape=(n, 8, 3, 3))
    made = Trajectories(torch.zeros(5, n, 1), torch.arange(5).flip(0), one.expand(5, *one.shape[1:]).contiguous())
    _, diagnostics = TDAC().select(made, n, numpy_rng(SELECTION, 0))
    assert set(diagnostics["counts"]) <= {n // 5, n // 5 + 1}
    assert diagnostics["variety"] == [0.0] * 5 and "each gives the same number" in caplog.text


def test_a_single_step_gives_every_row():
    made = Trajectories(torch.zeros(1, 4, 1), torch.tensor([0]), walk(1))
    assert TDAC().select(made, 4, numpy_rng(SELECTION, 0))[1]["counts"] == [4]


def test_diagnostics_say_where_the_counts_come_from(trajectories):
    _, given = TDAC(threshold=3.0, weight=0.5).select(trajectories, 24, numpy_rng(SELECTION, 0))
    assert (given["threshold"], given["threshold_from"]) == (3.0, "given")
    _, default = TDAC().select(trajectories, 24, numpy_rng(SELECTION, 0))
    assert default["threshold_from"] == "median" and default["threshold"] > 0
    assert {len(default[name]) for name in ("density", "variety", "share", "counts")} == {trajectories.steps}


def test_counts_do_not_depend_on_the_generator(trajectories):
    counts = [TDAC().select(trajectories, 24, numpy_rng(SELECTION, s))[1]["counts"] for s in range(3)]
    assert counts[0] == counts[1] == counts[2]


def test_features_are_needed_and_must_be_finite(trajectories):
    bare = Trajectories(trajectories.x, trajectories.timesteps)
    with pytest.raises(EdadmError, match="needs features"):
        TDAC().select(bare, 4, numpy_rng(SELECTION, 0))
    broken = Trajectories(trajectories.x, trajectories.timesteps, trajectories.features / 0)
    with pytest.raises(EdadmError, match="NaN or Inf"):
        TDAC().select(broken, 4, numpy_rng(SELECTION, 0))


@pytest.mark.parametrize("settings", [{"threshold": -1.0}, {"weight": -0.1}])
def test_negative_settings_are_errors(settings):
    with pytest.raises(EdadmError, match="must not be negative"):
        TDAC(**settings)


def test_no_copy_of_all_features_is_made():
    features = torch.randn(6, 3, 4096, 2)
    made = Trajectories(torch.zeros(6, 3, 1), torch.arange(6).flip(0), features)
    with CountLarge(features.numel()) as large:
        TDAC().select(made, 3, numpy_rng(SELECTION, 0))
    assert large.count == 0

from __future__ import annotations

import pytest
import torch

from edadm.errors import Diverged
from edadm.quant.quantizer import ActivationQuantizer, quantize_dequantize
from edadm.quant.ranges import (
    MSE,
    MinMax,
    QDiffusionMinMax,
    QDiffusionShrink,
    affine_qparams,
    minmax_qparams,
    qparams,
    signed_qparams,
)
from edadm.quant.rounding import per_channel

RULES = [
    MSE(),
    MSE(mid_zero_point=True),
    MSE(symmetric=False, candidates=20),
    MinMax(),
    QDiffusionMinMax(running=True),
    QDiffusionMinMax(symmetric=False, running=True),
    QDiffusionShrink(running=True),
    QDiffusionShrink(symmetric=True, search_activations=False, running=True),
]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def observed(rule, *batches: torch.Tensor, bits: int = 4) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(bits, "site")
    for batch in batches:
        rule.update(quantizer, batch)
    return quantizer


def test_range_is_widened_to_zero_and_zero_point_stays_on_the_grid():
    scale, zero_point = qparams(torch.tensor([1.0, -2.0, -1.0]), torch.tensor([3.0, -1.0, 2.0]), 16)
    torch.testing.assert_close(scale, torch.tensor([3.0, 2.0, 3.0]) / 15)
    assert zero_point.tolist() == [0, 15, 5]


def test_empty_range_has_a_positive_scale():
    scale, zero_point = qparams(torch.zeros(1), torch.zeros(1), 16)
    assert scale.item() == pytest.approx(1e-8) and zero_point.item() == 0


def test_zero_point_of_symmetric_ranges_is_decided_by_float32():
    t = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    zero_points = qparams(-t, t, 16)[1]
    assert set(zero_points.tolist()) == {7.0, 8.0}
    assert zero_points.double().mean() > 7.5  # 8 in about nine of ten (methods.md 0.2); in float64 ties go to even


def test_mid_zero_point_is_half_of_the_levels_unless_one_sided():
    weight = normal(50, 40)
    assert set(MSE().weight(weight, 4)[1].tolist()) == {7.0, 8.0}
    assert set(MSE(mid_zero_point=True).weight(weight, 4)[1].tolist()) == {8.0}
    assert set(MSE(mid_zero_point=True).weight(weight.abs(), 4)[1].tolist()) == {0.0}
    assert observed(MSE(mid_zero_point=True), normal(100), normal(100, seed=1), bits=8).zero_point == 128
    assert observed(MSE(mid_zero_point=True), -normal(100).abs(), bits=8).zero_point == 255


def test_search_beats_extrema():
    weight = normal(8, 300)

    def error(rule) -> torch.Tensor:
        scale, zero_point = (per_channel(v, weight) for v in rule.weight(weight, 3))
        return (weight - quantize_dequantize(weight, scale, zero_point, 8)).abs().pow(2.4).mean(1)

    assert (error(MSE()) < error(MinMax())).all()
    assert (error(MSE(symmetric=False)) < error(MinMax())).all()
    assert (error(QDiffusionShrink()) <= error(QDiffusionMinMax())).all()


def test_running_range_gives_the_first_batch_the_largest_weight():
    batches = [normal(2000, seed=i) * (i + 1) for i in range(3)]
    single = [observed(MSE(), batch).running[1] for batch in batches]
    quantizer = observed(MSE(), *batches)
    expected = 0.81 * single[0] + 0.09 * single[1] + 0.1 * single[2]
    torch.testing.assert_close(quantizer.running, (-expected, expected))
    scale, zero_point = qparams(*quantizer.running, 16)
    assert (quantizer.scale, quantizer.zero_point) == (scale, zero_point)


@pytest.mark.parametrize("first,side", [(1.0, "positive"), (-1.0, "negative")])
def test_side_of_the_first_batch_is_kept(first, side):
    quantizer = observed(MSE(), first * normal(500).abs(), normal(500, seed=1))
    assert quantizer.side == side
    assert quantizer.zero_point == (0 if side == "positive" else 15)


def test_min_max_takes_the_last_batch():
    quantizer = observed(MinMax(), normal(100) * 9, normal(100, seed=1))
    expected = minmax_qparams(*torch.aminmax(normal(100, seed=1)), 16)
    assert (quantizer.scale, quantizer.zero_point) == expected


def test_qdiffusion_keeps_the_first_batch_unless_running():
    batches = normal(100), normal(100, seed=1) * 9
    assert observed(QDiffusionMinMax(), *batches).scale == observed(QDiffusionMinMax(), batches[0]).scale
    moved = observed(QDiffusionMinMax(running=True), *batches).scale
    absmax = [batch.abs().max() for batch in batches]
    low = 0.95 * batches[0].min() + 0.05 * batches[1].min()
    high = 0.95 * batches[0].max() + 0.05 * batches[1].max()
    torch.testing.assert_close(moved.detach(), torch.maximum(-low, high) / 7)
    assert absmax[0] / 7 < moved < absmax[1] / 7


def test_signed_grid_has_zero_on_a_code_and_wastes_only_the_lowest():
    scale, zero_point = signed_qparams(torch.tensor(-1.0), torch.tensor(0.4), 16)
    x = torch.tensor([-1.0, 0.0, 0.4])
    codes = torch.round(x / scale) + zero_point
    assert codes.tolist() == [1, 8, 11]


def test_affine_range_away_from_zero_has_a_zero_point_off_the_codes():
    scale, zero_point = affine_qparams(torch.tensor(3.0), torch.tensor(6.0), 16)
    assert zero_point == -15
    x = torch.tensor([3.0, 6.0])
    torch.testing.assert_close(quantize_dequantize(x, scale, zero_point, 16), x)


def test_shrink_search_has_no_symmetric_form():
    with pytest.raises(ValueError, match="symmetric"):
        QDiffusionShrink(symmetric=True)


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_broken_numbers_name_the_quantizer(rule, value):
    x = normal(4, 10)
    x[2, 3] = value
    with pytest.raises(Diverged, match="site"):
        observed(rule, x)
    with pytest.raises(Diverged, match=r"conv_in\.weight_quantizer"):
        rule.weight(x, 4, "conv_in.weight_quantizer")


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_rule_sets_usable_ranges(rule):
    for shape in ((3, 5), (3, 5, 3, 3), (3, 5, 2)):
        scale, zero_point = rule.weight(normal(*shape), 4)
        assert scale.shape == zero_point.shape == (3,) and scale.dtype == torch.float32
        assert (scale > 0).all() and torch.equal(zero_point, zero_point.round())
    quantizer = observed(rule, normal(4, 5, 3, 3), normal(4, 5, 3, 3, seed=1))
    assert quantizer.ready and quantizer.scale > 0 and quantizer.zero_point == quantizer.zero_point.round()


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_memory_layout_does_not_matter(rule):
    x = normal(4, 6, 5, 5)
    strided = x.to(memory_format=torch.channels_last)
    assert observed(rule, strided).scale == observed(rule, x).scale
    for ours, theirs in zip(rule.weight(strided, 4), rule.weight(x, 4), strict=True):
        assert torch.equal(ours, theirs)


def test_channels_do_not_influence_each_other():
    weight = normal(6, 50) * torch.tensor([1e-3, 0.1, 1, 10, 0, 100])[:, None]
    together = MSE().weight(weight, 4)
    for channel in range(6):
        if channel == 4:
            continue  # an all-zero tensor alone counts as one-sided
        alone = MSE().weight(weight[channel : channel + 1], 4)
        assert all(torch.equal(a[0], b[channel]) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("value", [1.0, -3.0])
def test_a_constant_is_not_quantized_to_zero(rule, value):
    ones = torch.full((2, 5), value)
    quantizer = observed(rule, ones, ones, bits=8)
    error = (quantize_dequantize(ones, quantizer.scale, quantizer.zero_point, 256) - ones).abs().max()
    assert error < abs(value) / 100

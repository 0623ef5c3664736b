from __future__ import annotations

import pytest
import torch

from edadm.quant.rounding import (
    beta_schedule,
    hard_weight,
    init_alpha,
    per_channel,
    rectified_sigmoid,
    regulariser,
    soft_weight,
)

LEVELS = 16


@pytest.fixture
def quantized() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight (6, 4, 3, 3) that its 4-bit grid does not quite cover, with scale and zero point (6,)."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, 3, 3, generator=generator)
    scale = weight.flatten(1).abs().amax(1) * 0.8 / 7.5
    return weight, scale, torch.tensor([7.0, 8, 7, 8, 0, 15])


def plain_soft_weight(weight, scale, zero_point, alpha):
    s, z = per_channel(scale, weight), per_channel(zero_point, weight)
    return (torch.clamp(torch.floor(weight / s) + rectified_sigmoid(alpha) + z, 0, LEVELS - 1) - z) * s


def test_soft_weight_starts_at_the_full_precision_weight(quantized):
    weight, scale, zero_point = quantized
    alpha = init_alpha(weight, scale)
    soft = soft_weight(weight, scale, zero_point, LEVELS, alpha)
    s, z = per_channel(scale, weight), per_channel(zero_point, weight)
    inside = (weight / s > -z) & (weight / s < LEVELS - 1 - z)
    assert inside.any() and not inside.all()
    torch.testing.assert_close((soft / s)[inside], (weight / s)[inside], rtol=0, atol=1e-4)


def test_values_and_gradients_equal_the_plain_formula(quantized):
    weight, scale, zero_point = quantized
    generator = torch.Generator().manual_seed(1)
    start = init_alpha(weight, scale) + torch.randn(weight.shape, generator=generator) * 3
    grad = torch.randn(weight.shape, generator=generator)
    results = []
    for function in (
        lambda alpha: soft_weight(weight, scale, zero_point, LEVELS, alpha),
        lambda alpha: plain_soft_weight(weight, scale, zero_point, alpha),
    ):
        alpha = start.clone().requires_grad_()
        y = function(alpha)
        y.backward(grad)
        results.append((y.detach(), alpha.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-7)
    assert (results[0][1] == 0).any()


@pytest.mark.parametrize("edges", [False, True])
def test_values_on_a_bound_pass_the_gradient_only_with_edges(edges):
    weight, scale, zero_point = torch.tensor([[-8.0, 7.0, 1.5]]), torch.ones(1), torch.tensor([8.0])
    alpha = torch.full((1, 3), -20.0).requires_grad_()  # h is 0 up to its clamp: no gradient in either case
    soft_weight(weight, scale, zero_point, LEVELS, alpha, edges).sum().backward()
    assert not alpha.grad.any()
    alpha = torch.full((1, 3), -2.397894).requires_grad_()  # h is about 1e-7: lost in the code -8 + h
    assert 0 < rectified_sigmoid(alpha[0, 0]) < 2e-7
    soft_weight(weight, scale, zero_point, LEVELS, alpha, edges).sum().backward()
    assert (alpha.grad[0, 0] != 0) == edges
    assert alpha.grad[0, 2] != 0


def test_hard_weight_is_the_limit_of_the_soft_weight(quantized):
    weight, scale, zero_point = quantized
    up = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    alpha = torch.where(up, 30.0, -30.0)
    hard = hard_weight(weight, scale, zero_point, LEVELS, up)
    assert torch.equal(hard, soft_weight(weight, scale, zero_point, LEVELS, alpha))
    codes = hard / per_channel(scale, weight) + per_channel(zero_point, weight)
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert codes.min() > -0.5 and codes.max() < LEVELS - 0.5


def test_rectified_sigmoid_reaches_both_ends():
    h = rectified_sigmoid(torch.tensor([-10.0, 0.0, 10.0]))
    assert h.tolist() == [0.0, pytest.approx(0.5), 1.0]


def test_regulariser_vanishes_at_hard_rounding_and_pushes_away_from_the_middle():
    assert regulariser([torch.tensor([-10.0, 10.0]), torch.tensor([10.0])], 2.0).item() == 0
    alpha = torch.tensor([-0.5, 0.5], requires_grad=True)
    regulariser([alpha], 2.0).backward()
    assert alpha.grad[0] > 0 > alpha.grad[1]  # descent moves them outwards
    assert regulariser([torch.zeros(5)], 8.0).item() == pytest.approx(5)


def test_beta_is_off_in_warm_up_then_falls_linearly():
    assert [beta_schedule(i, 100) for i in (1, 19)] == [None, None]
    assert [beta_schedule(i, 100) for i in (20, 60, 100)] == [20, pytest.approx(11), 2]
    assert beta_schedule(1, 100, warmup=0.0) == pytest.approx(2 + 18 * 0.99)

from __future__ import annotations

import pytest
import torch

from edadm.errors import EdadmError
from edadm.quant.quantizer import ActivationQuantizer, WeightQuantizer, quantize_dequantize, quantize_ste
from edadm.quant.rounding import per_channel


def formula(x, scale, zero_point, levels):
    return (torch.clamp(torch.round(x / scale) + zero_point, 0, levels - 1) - zero_point) * scale


def reference_gradients(x, scale, zero_point, levels, keep, edges, grad):
    """Golden README 7.4 and 7.5 written out in float64, element by element."""
    x, scale, grad = x.double(), scale.double(), grad.double()
    r = x / scale
    u = torch.round(r) + zero_point
    inside = (u >= 0) & (u <= levels - 1) if edges else (u > 0) & (u < levels - 1)
    to_x = torch.where(inside | ~keep, grad, 0.0)
    to_scale = torch.where(inside, torch.round(r) - r, u.clamp(0, levels - 1) - zero_point)
    return to_x, torch.where(keep, grad * to_scale, 0.0).sum_to_size(scale.shape)


def tensor(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("zero_point", [0, 1, -3, 300])
def test_in_place_chain_equals_the_formula(bits, zero_point):
    x = torch.cat([tensor(1000), torch.tensor([0.0, -0.0, 0.05, 0.15, 0.25, -0.05, 1e30, -1e30])])
    before, scale, zero_point = x.clone(), torch.tensor(0.1), torch.tensor(float(zero_point))
    assert torch.equal(quantize_dequantize(x, scale, zero_point, 2**bits), formula(x, scale, zero_point, 2**bits))
    assert torch.equal(x, before)


def test_rounding_ties_go_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    y = quantize_dequantize(x, torch.tensor(1.0), torch.tensor(8.0), 16)
    assert y.tolist() == [0, 2, 2, 0, -2]


def test_quantizing_twice_changes_nothing():
    x, scale, zero_point = tensor(2000), torch.tensor(0.037), torch.tensor(100.0)
    once = quantize_dequantize(x, scale, zero_point, 256)
    assert torch.equal(quantize_dequantize(once, scale, zero_point, 256), once)


@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("shape", [(), (1, 5, 1, 1)])
def test_straight_through_values_and_gradients(shape, dropped, edges):
    x = tensor(4, 5, 6, 6).requires_grad_()
    scale = (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 0.2 + 0.3).requires_grad_()
    zero_point, levels, grad = torch.full(shape, 5.0), 16, tensor(4, 5, 6, 6, seed=2)
    keep = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.5 if dropped else None
    y = quantize_ste(x, scale, zero_point, levels, keep, edges)
    expected = formula(x.detach(), scale.detach(), zero_point, levels)
    every = torch.ones_like(x, dtype=torch.bool) if keep is None else keep
    assert torch.equal(y, torch.where(every, expected, x.detach()))
    y.backward(grad)
    codes = torch.round(x.detach() / scale.detach()) + zero_point
    assert ((codes == 0).any() and (codes == levels - 1).any()) and ((codes < 0).any() and (codes > levels - 1).any())
    to_x, to_scale = reference_gradients(x.detach(), scale.detach(), zero_point, levels, every, edges, grad)
    assert torch.equal(x.grad.double(), to_x)
    torch.testing.assert_close(scale.grad.double(), to_scale, rtol=2e-5, atol=2e-5)  # float32 sums of 180-720 terms


def test_scale_gradient_is_the_slope_between_code_changes():
    """Between rounding boundaries Q is x-independent codes times scale; x / scale moves by straight-through."""
    x, zero_point = tensor(500).double(), torch.tensor(8.0, dtype=torch.float64)
    scale = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    quantize_ste(x, scale, zero_point, 16, None, True).sum().backward()

    def smooth(s: torch.Tensor) -> torch.Tensor:  # round(r) replaced by r + its fixed residual
        residual = torch.round(x / 0.4) - x / 0.4
        inside = (torch.round(x / 0.4) + 8 >= 0) & (torch.round(x / 0.4) + 8 <= 15)
        clipped = (torch.round(x / 0.4) + 8).clamp(0, 15) - 8
        return (torch.where(inside, x / s + residual, clipped) * s).sum()

    h = 1e-6
    above, below = (smooth(torch.tensor(0.4 + step, dtype=torch.float64)) for step in (h, -h))
    assert scale.grad.item() == pytest.approx(((above - below) / (2 * h)).item(), rel=1e-6)


def test_gradients_are_computed_only_where_asked():
    x, scale = tensor(10), torch.tensor(0.5, requires_grad=True)
    quantize_ste(x, scale, torch.tensor(8.0), 16).sum().backward()
    assert x.grad is None and scale.grad.shape == ()
    x.requires_grad_()
    quantize_ste(x, scale.detach(), torch.tensor(8.0), 16).sum().backward()
    assert x.grad.shape == x.shape


class Recorder:
    def __init__(self, scale: float):
        self.scale, self.seen = scale, []

    def update(self, quantizer, x):
        self.seen.append((x.clone(), x.requires_grad))
        quantizer.set(self.scale, 8.0)


def test_quantizer_is_the_identity_until_enabled_and_at_float_widths():
    x = tensor(10)
    assert ActivationQuantizer(8, "site")(x) is x
    for bits in (16, 32):
        quantizer = ActivationQuantizer(bits, "site")
        quantizer.enabled = True
        assert quantizer(x) is x


def test_enabled_quantizer_without_range_names_itself():
    quantizer = ActivationQuantizer(8, "mid_block.conv1.act_quantizer")
    quantizer.enabled = True
    with pytest.raises(EdadmError, match=r"mid_block\.conv1\.act_quantizer"):
        quantizer(tensor(3))


def test_observer_sets_the_range_before_the_batch_is_quantized():
    quantizer, observer = ActivationQuantizer(4, "site"), Recorder(0.25)
    quantizer.enabled, quantizer.observe = True, observer
    x = tensor(10).requires_grad_()
    y = quantizer(x)
    assert torch.equal(y, formula(x.detach(), torch.tensor(0.25), torch.tensor(8.0), 16))
    assert torch.equal(observer.seen[0][0], x) and not observer.seen[0][1]
    quantizer.observe = None
    quantizer(x)
    assert len(observer.seen) == 1


def test_training_gradients_are_a_switch():
    quantizer = ActivationQuantizer(4, "site")
    quantizer.set(0.25, 8.0)
    quantizer.enabled = True
    x = tensor(10).requires_grad_()
    assert not quantizer(x).requires_grad
    quantizer.training_grad = True
    quantizer.scale.requires_grad_()
    quantizer(x).sum().backward()
    assert x.grad is not None and quantizer.scale.grad is not None


def test_dropped_elements_pass_unquantized():
    quantizer = ActivationQuantizer(4, "site")
    quantizer.set(0.25, 8.0)
    x, keep = tensor(100), torch.arange(100) % 3 == 0
    quantizer.enabled, quantizer.drop = True, lambda name, shape, device: keep
    expected = torch.where(keep, formula(x, torch.tensor(0.25), torch.tensor(8.0), 16), x)
    for quantizer.training_grad in (False, True):
        assert torch.equal(quantizer(x), expected)


def test_reset_range_forgets_everything():
    quantizer = ActivationQuantizer(4, "site")
    quantizer.set(0.25, 8.0)
    quantizer.running = torch.zeros(1), torch.ones(1)
    quantizer.side = "both"
    quantizer.reset_range()
    assert not quantizer.ready
    assert quantizer.running is None and quantizer.side is None


def test_activation_state_travels_in_the_state_dict():
    source, target = ActivationQuantizer(4, "site"), ActivationQuantizer(4, "site")
    source.set(0.25, 7.0)
    target.load_state_dict(source.state_dict())
    assert (target.scale.item(), target.zero_point.item()) == (0.25, 7.0)


def test_weight_quantizer_rounds_to_nearest_or_as_told():
    weight, quantizer = tensor(5, 3, 2, 2), WeightQuantizer(4, "layer")
    with pytest.raises(EdadmError, match="layer"):
        quantizer.hard(weight)
    scale, zero_point = torch.linspace(0.2, 0.6, 5), torch.tensor([7.0, 8, 8, 0, 15])
    quantizer.set(scale, zero_point)
    s, z = per_channel(scale, weight), per_channel(zero_point, weight)
    assert torch.equal(quantizer.hard(weight), formula(weight, s, z, 16))
    quantizer.hard_up = tensor(5, 3, 2, 2, seed=1) > 0
    up = (torch.clamp(torch.floor(weight / s) + quantizer.hard_up + z, 0, 15) - z) * s
    assert torch.equal(quantizer.hard(weight), up)
    quantizer.set(scale, zero_point)
    assert torch.equal(quantizer.hard(weight), formula(weight, s, z, 16))


def test_weight_quantizer_at_float_width_returns_the_weight():
    weight = tensor(5, 3)
    assert WeightQuantizer(32, "layer").hard(weight) is weight


def test_the_gradient_of_a_scale_is_summed_in_parts_where_a_tensor_is_too_long_for_one(monkeypatch):
    def gradient() -> float:
        scale = torch.tensor(0.3, requires_grad=True)
        quantize_ste(tensor(101), scale, torch.tensor(8.0), 16).square().sum().backward()
        return scale.grad.item()

    whole = gradient()
    monkeypatch.setattr("edadm.quant.quantizer.MOST_OF_A_DOT", 10)
    assert gradient() == pytest.approx(whole, rel=1e-5)

"""Running ranges of activations, QDrop and the straight-through gradients (golden README 7)."""

from __future__ import annotations

import pytest
import torch

from edadm.quant.quantizer import ActivationQuantizer, quantize_ste
from edadm.quant.ranges import MSE, MinMax
from tests.golden.cases import assert_close, assert_close_to_max, load

RULES = {
    "mse_sym": MSE(),
    "mse_asym": MSE(symmetric=False),
    "max_asym": MinMax(),
    "max_always_zero": MinMax(always_zero=True),
}
NOT_OFFERED = {"max_sym"}  # maps every negative value to 0 (6.5, 7.3)
SIDES = {"no": "both", "pos": "positive", "neg": "negative"}


def test_ranges_after_every_batch_equal_official(golden):
    case, tensors = load(golden / "eda_ddim" / "06_act_quant")
    tolerance = case["tolerance"]
    assert {c["mode"] for c in case["cases"]} <= RULES.keys() | NOT_OFFERED
    for c in case["cases"]:
        name, batches = c["name"], tensors[f"x.{c['x']}"]
        quantizer = ActivationQuantizer(c["bits"], name)
        if c["mode"] in NOT_OFFERED:  # the range is the official one, its values are still ours
            quantizer.set(*(tensors[f"{name}.{kind}_after_batch"][-1] for kind in ("delta", "zero_point")))
            quantizer.enabled = True
            assert_close_to_max(quantizer(batches[0]), tensors[f"{name}.y_batch0_after"], tolerance["y_abs_rel_to_max"])
            continue
        quantizer.enabled, quantizer.observe = True, RULES[c["mode"]]
        states = []
        for batch in batches:
            quantizer(batch)
            state = (quantizer.scale, quantizer.zero_point, *(quantizer.running or ()))
            states.append(torch.cat([value.detach().reshape(1) for value in state]))
        scale, zero_point, *running = torch.stack(states).unbind(1)
        assert_close(scale, tensors[f"{name}.delta_after_batch"], tolerance["delta_rel"])
        assert torch.equal(zero_point, tensors[f"{name}.zero_point_after_batch"]), name
        for values, kind in zip(running, ("running_min", "running_max"), strict=False):
            assert_close(values, tensors[f"{name}.{kind}"], tolerance["running_rel"])
        if c["one_side"] is not None:
            assert quantizer.side == SIDES[c["one_side"]], name
        quantizer.observe = None
        assert_close_to_max(quantizer(batches[0]), tensors[f"{name}.y_batch0_after"], tolerance["y_abs_rel_to_max"])


@pytest.mark.parametrize("kind", ["qdrop", "nodrop"])
def test_values_and_gradients_equal_official(kind, golden):
    case, tensors = load(golden / "eda_ddim" / "06_act_quant")
    drop, tolerance = case["qdrop"], case["tolerance"]
    x = tensors["qdrop.x"].clone().requires_grad_()
    scale = tensors["qdrop.delta"].clone().requires_grad_()
    keep = tensors["qdrop.u"] < drop["prob"] if kind == "qdrop" else None
    y = quantize_ste(x, scale, tensors["qdrop.zero_point"], 2 ** drop["bits"], keep)
    (y * tensors["qdrop.w"]).sum().backward()
    assert_close_to_max(y, tensors[f"{kind}.y"], tolerance["y_abs_rel_to_max"])
    assert_close_to_max(x.grad, tensors[f"{kind}.grad_x"], tolerance["grad_rel"])
    assert_close(scale.grad, tensors[f"{kind}.grad_delta"], tolerance["grad_rel"])


def test_quantizer_module_replays_qdrop(golden):
    case, tensors = load(golden / "eda_ddim" / "06_act_quant")
    asked = []

    def drop(name: str, shape: torch.Size, device: torch.device) -> torch.Tensor:
        asked.append((name, shape, device))
        return tensors["qdrop.u"] < case["qdrop"]["prob"]

    quantizer = ActivationQuantizer(case["qdrop"]["bits"], "site")
    quantizer.set(tensors["qdrop.delta"], tensors["qdrop.zero_point"])
    quantizer.enabled, quantizer.drop = True, drop
    x = tensors["qdrop.x"]
    for training_grad in (False, True):
        quantizer.training_grad = training_grad
        assert_close_to_max(quantizer(x), tensors["qdrop.y"], case["tolerance"]["y_abs_rel_to_max"])
    assert asked == [("site", x.shape, x.device)] * 2

"""Q-Diffusion's ranges of weights and activations (golden README 12.1, 12.2)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edadm.quant.quantizer import ActivationQuantizer, WeightQuantizer
from edadm.quant.ranges import QDiffusionMinMax, QDiffusionShrink
from tests.golden.cases import assert_close, assert_close_to_max, load

WEIGHT_RULES = {"max": QDiffusionMinMax(), "mse": QDiffusionShrink()}
ACTIVATION_RULES = {
    "max_sym": QDiffusionMinMax(running=True),
    "max_asym": QDiffusionMinMax(symmetric=False, running=True),
    "max_always_zero": QDiffusionMinMax(symmetric=False, running=True, always_zero=True),
    "mse_asym": QDiffusionShrink(running=True),
    "mse_always_zero": QDiffusionShrink(running=True, always_zero=True),
}


@pytest.fixture
def units(golden: Path) -> tuple[dict, dict]:
    folder = golden / "eda_ddim" / "11_qdiffusion"
    return load(folder / "units")


def test_weight_ranges_equal_official(units):
    case, tensors = units
    assert {c["mode"] for c in case["weight_cases"]} <= WEIGHT_RULES.keys()
    for c in case["weight_cases"]:
        weight, name = tensors[f"w.{c['weight']}"], c["name"]
        quantizer = WeightQuantizer(c["bits"], name)
        quantizer.set(*WEIGHT_RULES[c["mode"]].weight(weight, c["bits"]))
        assert_close(quantizer.scale, tensors[f"{name}.delta"], case["tolerance"]["delta_rel"])
        assert torch.equal(quantizer.zero_point, tensors[f"{name}.zero_point"]), name
        for key in (f"{name}.dequant", f"{name}.y"):
            if key in tensors:
                dequantized = quantizer.hard(weight)[: len(tensors[key])]
                assert_close_to_max(dequantized, tensors[key], case["tolerance"]["y_abs_rel_to_max"])


def test_first_and_running_activation_ranges_equal_official(units):
    case, tensors = units
    tolerance = case["tolerance"]
    assert {c["mode"] for c in case["activation_cases"]} <= ACTIVATION_RULES.keys()
    for c in case["activation_cases"]:
        name, batches = c["name"], tensors[f"x.{c['x']}"]
        quantizer = ActivationQuantizer(c["bits"], name)
        quantizer.enabled, quantizer.observe = True, ACTIVATION_RULES[c["mode"]]
        # The official symmetric grid has signed codes up to ``levels`` and zero point 0; ours are shifted.
        shift = 0 if c["levels"] == quantizer.levels else c["levels"] + 1
        first = quantizer(batches[0])
        states = [(quantizer.scale.clone(), quantizer.zero_point - shift)]
        for batch in batches:
            quantizer(batch)
            states.append((quantizer.scale.clone(), quantizer.zero_point - shift))
        scales, zero_points = (torch.stack(values) for values in zip(*states, strict=True))
        assert_close(scales, tensors[f"{name}.delta"], tolerance["delta_rel"])
        assert torch.equal(zero_points, tensors[f"{name}.zero_point"]), name
        assert_close_to_max(first, tensors[f"{name}.y_init"], tolerance["y_abs_rel_to_max"])
        quantizer.observe = None
        assert_close_to_max(quantizer(batches[0]), tensors[f"{name}.y_final"], tolerance["y_abs_rel_to_max"])

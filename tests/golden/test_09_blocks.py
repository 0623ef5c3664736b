"""Quantized attention block and resnet with split shortcut (golden README 10)."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from edadm.quant.layers import QuantLayer
from edadm.quant.network import Bits, QuantModel, SitePlan
from tests.golden.cases import load
from tests.golden.official import block_module, quantizers_of
from tests.golden.replay import to_our_layout


@pytest.mark.parametrize("folder", ["09_attention", "09b_split_shortcut"])
def test_block_output_equals_official(folder, golden, golden_unet, official_names):
    case, tensors = load(golden / "eda_ddim" / folder)
    for tag, variant in case["variants"].items():
        bits = Bits(variant["weight_bits"], variant["act_bits"], variant["softmax_bits"])
        network = QuantModel.wrap(copy.deepcopy(golden_unet), bits, SitePlan())
        quantizers = quantizers_of(network, official_names, case["block"])
        block = network.model.get_submodule(block_module(case["block"], official_names))
        if "split" in case:
            splits = [m.split for m in block.modules() if isinstance(m, QuantLayer) and m.split]
            assert splits == [case["split"]]
        for name, facts in variant["quantizers"].items():
            assert quantizers[name].bits == facts["bits"], name
            quantizers[name].set(tensors[f"{tag}.{name}.delta"], tensors[f"{tag}.{name}.zero_point"])
        arguments = [tensors["x"]] + ([tensors["temb"]] if "temb" in tensors else [])
        inside = _inside(tensors, tag)
        stored = [name for name in inside if "act_quantizer" not in name]
        layers = {name: network.layers[official_names[f"{case['block']}.{name}"]] for name in stored}
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        with torch.no_grad():
            float_output = block(*arguments)
            network.set_state(weights=True, activations=True)
            for name, module in (quantizers | layers).items():
                if "weight_quantizer" not in name:
                    module.register_forward_hook(partial(_keep, seen, name))
            output = block(*arguments)
        if "y_fp" in tensors:
            assert _relative(float_output, tensors["y_fp"]).max() <= 2e-5
        error = _relative(output, tensors[f"{tag}.y"])
        tolerance = case["tolerance"]["y_max_abs_rel_to_max"]
        assert (~(error <= tolerance)).float().mean() <= 1e-3, tag  # NaN counts as an error
        for name in inside:
            for value, which in zip(seen[name], ("in", "out"), strict=True):
                error = _relative(value[:1], to_our_layout(tensors[f"{tag}.inter.{name}.{which}"], name, value.ndim))
                assert (~(error <= tolerance)).float().mean() <= 1e-3, (tag, name, which)


def _inside(tensors, tag):
    """Names of the layers and quantizers whose input and output are stored, of row 0."""
    prefix = f"{tag}.inter."
    return sorted({key.removeprefix(prefix).rpartition(".")[0] for key in tensors if key.startswith(prefix)})


def _keep(seen, name, _module, inputs, output):
    seen[name] = (inputs[0].clone(), output.clone())


def _relative(value, expected):
    return (value - expected.view_as(value)).abs() / expected.abs().max()

"""Full-precision network: checkpoint conversion and blocks against the official code (golden README 3)."""

from __future__ import annotations

import torch

from edadm.tasks.ddim_checkpoint import convert, module_name
from tests.golden.cases import load
from tests.golden.official import block_module


def test_key_map_equals_the_official_one(mapping_case):
    levels = len(mapping_case["network"]["ch_mult"])
    for entry in mapping_case["mapping"]:
        module, _, kind = entry["official"].rpartition(".")
        assert f"{module_name(module, levels)}.{kind}" == entry["diffusers"]
        weight = torch.zeros(2, 3, 1, 1) if entry["transform"] == "squeeze_1x1" else torch.zeros(2, 3)
        (converted,) = convert({entry["official"]: weight}, levels).values()
        assert converted.shape == (2, 3)


def test_network_output_equals_official(golden, golden_unet, mapping_case):
    _, tensors = load(golden / "eda_ddim" / "01_mapping")
    with torch.no_grad():
        eps = golden_unet(tensors["x"], tensors["t"]).sample
    assert (eps - tensors["eps"]).abs().max() <= mapping_case["tolerance"]["eps_max_abs"]


def test_blocks_equal_official(golden, golden_unet, official_names):
    case, tensors = load(golden / "eda_ddim" / "02_fp_forward")
    outputs = {}
    for block in case["blocks"]:
        module = golden_unet.get_submodule(block_module(block, official_names))
        module.register_forward_hook(lambda _m, _a, out, block=block: outputs.__setitem__(block, out))
    with torch.no_grad():
        eps = golden_unet(tensors["x"], tensors["t"]).sample
    assert (eps - tensors["eps"]).abs().max() <= case["tolerance"]["eps_max_abs"]
    for block in case["blocks"]:
        expected = tensors[f"block.{block}.out"]
        error = (outputs[block][: case["rows_stored"]] - expected).abs().max() / expected.abs().max()
        assert error <= case["tolerance"]["block_max_abs_rel_to_max"], block

"""DiT as a diffusers module (golden README, ldm, 4.8)."""

from __future__ import annotations

import pytest
import torch

from edadm.quant.families.dit import FAMILY
from edadm.tasks.dit_checkpoint import convert_dit, dit_params
from edadm.tasks.model_folder import load_model
from tests.golden import ldm_cases

INPUTS = {"x", "t", "y", "cfg_x", "cfg_t", "cfg_y"}


@pytest.fixture(params=ldm_cases.names("dit"))
def case(request):
    return ldm_cases.load(request.param)


@pytest.fixture
def dit(case):
    return convert_dit(case.weights, dit_params(case.config["original"]["params"]), "golden weights")


@torch.no_grad()
def predictions(dit, case, dtype):
    io = case.io
    dit.to(dtype)
    guided_x = io["cfg_x"].chunk(2)[0].repeat(2, 1, 1, 1)  # the first half of the batch serves both halves
    raw = dit(io["cfg_x"].to(dtype), io["cfg_t"], io["cfg_y"]).sample
    both = dit(guided_x.to(dtype), io["cfg_t"], io["cfg_y"]).sample
    channels, scale = case.config["cfg_channels"], case.config["cfg_scale"]
    conditional, without = both[:, :channels].chunk(2)
    guided = without + scale * (conditional - without)
    return {
        "out": dit(io["x"].to(dtype), io["t"], io["y"]).sample,
        "cfg_raw": raw,
        "cfg_out": torch.cat([guided.repeat(2, 1, 1, 1), both[:, channels:]], dim=1),
    }


def test_weights_and_config_are_those_of_the_key_map(case, dit):
    ldm_cases.assert_config(case.config["diffusers"], dit)
    ldm_cases.assert_key_map(case, dit)
    assert torch.equal(dit.pos_embed.pos_embed, case.weights["pos_embed"])
    assert FAMILY.parameters(dit) == sum(tensor.numel() for tensor in case.weights.values())


def test_outputs_equal_the_original(case, dit):
    compared = set()
    for precision, dtype in ((32, torch.float32), (64, torch.float64)):
        compared |= ldm_cases.compare(case, predictions(dit, case, dtype), precision)
    assert compared | INPUTS >= set(case.io)


def test_saved_and_read_again_it_is_the_same_network(case, dit, tmp_path):
    dit.save_pretrained(tmp_path)
    assert "out_f64" in ldm_cases.compare(case, predictions(load_model(tmp_path), case, torch.float64), 64)

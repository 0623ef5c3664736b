"""A whole latent diffusion checkpoint (golden README, ldm, 4.9, 9 and 10)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edadm.tasks.compvis_unet import unet_params
from edadm.tasks.first_stage import first_stage_params
from edadm.tasks.ldm_checkpoint import LdmParams, load_ldm, load_ldm_folder, save_ldm
from edadm.tasks.model_folder import ATTENTION_HEADS
from tests.golden import ldm_cases

INPUTS = {"x", "t", "z"}


@pytest.fixture(params=ldm_cases.names("checkpoint"))
def case(request):
    return ldm_cases.load(request.param)


@pytest.fixture
def params(case):
    original = case.config["original"]
    values = original["params"]
    return LdmParams(
        unet=unet_params(values["unet_config"]["params"], original["norm_groups"]),
        first_stage=first_stage_params(values["first_stage_config"]["params"], original["first_stage_norm_groups"]),
        linear_start=values["linear_start"],
        linear_end=values["linear_end"],
        timesteps=values["timesteps"],
        ema=case.config["use"] == "ema",
        scale_factor=None if values["scale_by_std"] else case.config["scale_factor"],
    )


@pytest.fixture
def checkpoint(case, tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"epoch": 3, "global_step": 17, "state_dict": case.weights}, path)
    return path


@torch.no_grad()
def results(model, case, dtype, weights):
    unet, autoencoder = model.unet.to(dtype), model.first_stage.to(dtype)
    return {
        f"eps_{weights}": unet(case.io["x"].to(dtype), case.io["t"]).sample,
        "decoded": autoencoder.decode(case.io["z"].to(dtype) / model.scale_factor).sample,
    }


def test_configs_buffers_and_factor_are_those_of_the_checkpoint(case, params, checkpoint):
    model = load_ldm(checkpoint, params)
    stored = case.config["diffusers"]
    ldm_cases.assert_config(stored["unet"], model.unet)
    ldm_cases.assert_config(stored["vae"], model.first_stage)
    assert model.unet.config.get(ATTENTION_HEADS) == stored["unet"]["set_attention_heads"]
    assert model.scale_factor == case.config["scale_factor"] == model.first_stage.config.scaling_factor
    assert torch.equal(model.alphas_cumprod, case.weights["alphas_cumprod"])


def test_outputs_equal_the_original_with_either_weights(case, params, checkpoint):
    compared = set()
    for weights in ("ema", "raw"):
        model = load_ldm(checkpoint, replace(params, ema=weights == "ema"))
        for precision, dtype in ((32, torch.float32), (64, torch.float64)):
            compared |= ldm_cases.compare(case, results(model, case, dtype, weights), precision)
    assert compared | INPUTS >= set(case.io)


def test_a_converted_folder_is_the_same_model(case, params, checkpoint, tmp_path):
    save_ldm(load_ldm(checkpoint, params), tmp_path / "converted")
    again = load_ldm_folder(tmp_path / "converted")
    assert again.scale_factor == case.config["scale_factor"] and again.class_embedder is None
    assert torch.equal(again.alphas_cumprod, case.weights["alphas_cumprod"])
    computed = results(again, case, torch.float64, case.config["use"])
    assert {"decoded_f64", f"eps_{case.config['use']}_f64"} <= ldm_cases.compare(case, computed, 64)

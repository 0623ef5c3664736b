"""VQ-f4 and KL-f8 as diffusers modules (golden README, ldm, 4.7)."""

from __future__ import annotations

import pytest
import torch

from edadm.tasks.first_stage import convert_first_stage, first_stage_params
from edadm.tasks.model_folder import load_model
from tests.golden import ldm_cases

INPUTS = {"image", "z", "eps"}


def autoencoder(case):
    prefix, original = case.config["checkpoint_prefix"], case.config["original"]
    state = {key.removeprefix(prefix): t for key, t in case.weights.items()}
    params = first_stage_params(original["params"], original["norm_groups"])
    return convert_first_stage(state, params, case.config["scale_factor"], "golden weights")


@torch.no_grad()
def vq_results(model, case, dtype):
    model.to(dtype)
    computed = {}
    if "image" in case.io:
        computed["prequant"] = model.encode(case.io["image"].to(dtype)).latents
    z = case.io["z"].to(dtype)
    computed["decoded"] = model.decode(z).sample
    computed["decoded_noquant"] = model.decode(z, force_not_quantize=True).sample
    quantized, _, (_, _, indices) = model.quantize(z)
    computed["quantized"] = quantized
    assert torch.equal(indices.flatten(), case.io["indices"].flatten())
    return computed


@torch.no_grad()
def kl_results(model, case, dtype):
    model.to(dtype)
    factor = model.config.scaling_factor
    posterior = model.encode(case.io["image"].to(dtype)).latent_dist
    sample = posterior.mean + torch.exp(posterior.logvar / 2) * case.io["eps"].to(dtype)
    return {
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "latents": factor * sample,
        "decoded": model.decode(case.io["z"].to(dtype) / factor).sample,
    }


RESULTS = {"vae_vq": vq_results, "vae_kl": kl_results}


@pytest.fixture(params=ldm_cases.names("vae_vq", "vae_kl"))
def case(request):
    return ldm_cases.load(request.param)


def test_weights_and_config_are_those_of_the_key_map(case):
    model = autoencoder(case)
    ldm_cases.assert_config(case.config["diffusers"], model)
    ldm_cases.assert_key_map(case, model)


def test_latents_and_images_equal_the_original(case):
    model, results = autoencoder(case), RESULTS[case.config["kind"]]
    compared = {"indices"}
    for precision, dtype in ((32, torch.float32), (64, torch.float64)):
        compared |= ldm_cases.compare(case, results(model, case, dtype), precision)
    assert compared | INPUTS >= set(case.io)


def test_saved_and_read_again_it_is_the_same_network(case, tmp_path):
    autoencoder(case).save_pretrained(tmp_path)
    results = RESULTS[case.config["kind"]](load_model(tmp_path), case, torch.float32)
    assert "decoded_f32" in ldm_cases.compare(case, results, 32)

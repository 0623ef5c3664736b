"""The UNets of latent diffusion and Stable Diffusion as diffusers modules (golden README, ldm, 4.2 to 4.6)."""

from __future__ import annotations

import pytest
import torch

from edadm.tasks.compvis_unet import convert_unet, unet_params
from edadm.tasks.ldm_checkpoint import class_embedder
from edadm.tasks.model_folder import ATTENTION_HEADS, load_model
from tests.golden import ldm_cases

CASES = ldm_cases.names("unet")
INPUTS = {"x", "t", "t_frac", "y", "context", "uncond_context"}


@pytest.fixture(params=CASES)
def case(request):
    return ldm_cases.load(request.param)


@pytest.fixture
def unet(case):
    prefix = case.config["checkpoint_prefix"]
    original = case.config["original"]
    state = {key.removeprefix(prefix): t for key, t in case.weights.items() if key.startswith(prefix)}
    return convert_unet(state, unet_params(original["params"], original["norm_groups"]), "golden weights")


def contexts(case):
    """Conditional and unconditional context, None for a model without."""
    if "class_embedder" not in case.config:
        return case.io.get("context"), case.io.get("uncond_context")
    values = case.config["class_embedder"]["params"]
    embedder = class_embedder(case.weights, values["n_classes"], values["embed_dim"], "golden weights")
    assert embedder.null_class == case.config["null_class"]
    labels = case.io["y"]
    return embedder(labels).detach(), embedder(torch.full_like(labels, embedder.null_class)).detach()


def eps(unet, x, t, context):
    condition = {} if context is None else {"encoder_hidden_states": context.to(x.dtype)}
    return unet(x, t, return_dict=False, **condition)[0]


@torch.no_grad()
def output_and_taps(unet, case, dtype):
    """The output of the conditional network, its time embedding and that of its middle block."""
    computed = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, output, name=name: computed.__setitem__(name, output))
        for name, module in {"tap.time_embed": unet.time_embedding, "tap.mid": unet.mid_block}.items()
    ]
    computed["out"] = eps(unet.to(dtype), case.io["x"].to(dtype), case.io["t"], contexts(case)[0])
    for handle in handles:
        handle.remove()
    return computed


@torch.no_grad()
def other_outputs(unet, case, dtype):
    """Outputs at fractional times, without condition, and guided from one batch (unconditional, conditional)."""
    io, x = case.io, case.io["x"].to(dtype)
    condition, uncondition = contexts(case)
    computed = {}
    if "t_frac" in io:
        computed["out_frac"] = eps(unet, x, io["t_frac"], condition)
    if uncondition is not None:
        both = eps(unet, x.repeat(2, 1, 1, 1), io["t"].repeat(2), torch.cat([uncondition, condition]))
        without, conditional = both.chunk(2)
        computed["out_uncond"] = without
        for scale in case.config["guidance_scales"]:
            computed[f"guided_{scale}"] = without + scale * (conditional - without)
    return computed


def test_weights_and_config_are_those_of_the_key_map(case, unet):
    stored = case.config["diffusers"]
    ldm_cases.assert_config(stored, unet)
    assert unet.config.get(ATTENTION_HEADS) == stored["set_attention_heads"]
    ldm_cases.assert_key_map(case, unet, case.config["checkpoint_prefix"])


def test_outputs_equal_the_original(case, unet):
    compared = set()
    for precision, dtype in ((32, torch.float32), (64, torch.float64)):
        computed = output_and_taps(unet, case, dtype) | other_outputs(unet, case, dtype)
        compared |= ldm_cases.compare(case, computed, precision)
    assert "out_f64" in compared and compared | INPUTS >= set(case.io)


def test_saved_and_read_again_it_is_the_same_network(case, unet, tmp_path):
    unet.save_pretrained(tmp_path)
    assert "out_f64" in ldm_cases.compare(case, output_and_taps(load_model(tmp_path), case, torch.float64), 64)

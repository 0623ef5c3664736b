from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from edadm.errors import EdadmError
from edadm.tasks.ldm_checkpoint import LDM_MODELS, load_ldm, load_ldm_folder, save_ldm, text_encoder_state
from tests.tasks import originals
from tests.tasks.originals import LDM


@pytest.fixture
def state():
    return originals.ldm_state()


@pytest.fixture
def load(tmp_path):
    def load(state, params=LDM):
        path = tmp_path / "model.ckpt"
        torch.save({"state_dict": state, "global_step": 5}, path)
        return load_ldm(path, params)

    return load


def test_ema_or_raw_weights_as_the_params_say(load, state):
    ema, raw = load(state).unet, load(state, replace(LDM, ema=False)).unet
    assert torch.equal(ema.conv_out.bias, state["model_ema.diffusion_modelout2bias"])
    assert torch.equal(raw.conv_out.bias, state["model.diffusion_model.out.2.bias"])
    assert not torch.equal(ema.conv_out.bias, raw.conv_out.bias)


def test_a_safetensors_file_is_the_same_model(load, state, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    a, b = load(state), load_ldm(tmp_path / "model.safetensors", LDM)
    assert all(torch.equal(t, b.unet.state_dict()[key]) for key, t in a.unet.state_dict().items())
    assert a.scale_factor == b.scale_factor == 0.25 == a.first_stage.config.scaling_factor


def test_class_embedder_gives_one_token_and_its_last_row_is_the_null_class(load, state):
    embedder = load(state).class_embedder
    assert embedder.null_class == 4
    context = embedder(torch.tensor([2, 4]))
    assert torch.equal(context, state["cond_stage_model.embedding.weight"][[2, 4]][:, None])


def test_a_converted_folder_keeps_every_part(load, state, tmp_path):
    model = load(state)
    save_ldm(model, tmp_path / "converted")
    again = load_ldm_folder(tmp_path / "converted")
    assert again.scale_factor == 0.25 and torch.equal(again.alphas_cumprod, state["alphas_cumprod"])
    for part in ("unet", "first_stage", "class_embedder"):
        expected, read = getattr(model, part).state_dict(), getattr(again, part).state_dict()
        assert expected.keys() == read.keys() and all(torch.equal(expected[key], read[key]) for key in read)


EMA_BIAS = "model_ema.diffusion_modelout2bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({EMA_BIAS: None}, f"EMA weights of another model: missing {EMA_BIAS}"),
        ({"model_ema.diffusion_modelother": torch.zeros(1)}, "unexpected model_ema.diffusion_modelother"),
        (
            {"model.diffusion_model.label_emb.0.0.weight": torch.zeros(1)},
            "missing model_ema.diffusion_modellabel_emb00weight",
        ),
        ({"scale_factor": None}, "has no scale_factor, .* stands in no config"),
        ({"scale_factor": torch.tensor(0.0)}, "scale_factor 0.0: it must be positive"),
        ({"betas": None}, "no schedule: missing betas"),
        ({"alphas_cumprod": torch.linspace(1, 0.1, 1000)}, "another noise schedule .* last alphas_cumprod is 0.1"),
        ({"cond_stage_model.embedding.weight": None}, r"embedding\.weight is missing, expected \(5, 6\)"),
        ({"cond_stage_model.embedding.weight": torch.zeros(4, 6)}, r"is of shape \(4, 6\), expected \(5, 6\)"),
        ({"first_stage_model.quantize.embedding.weight": None}, r"VQModel: missing quantize\.embedding\.weight"),
        (
            {EMA_BIAS: torch.zeros(4)},
            r"\(EMA of model\.diffusion_model\.\*\) does not fit .*out\.2\.bias of shape \(4,\) does not give conv_out\.bias of shape \(3,\)",
        ),
        ({EMA_BIAS: torch.full((3,), float("inf"))}, r"conv_out\.bias has NaN or Inf"),
    ],
)
def test_what_is_missing_extra_or_wrong_is_named(load, state, change, message):
    changed = {key: tensor for key, tensor in (state | change).items() if tensor is not None}
    with pytest.raises(EdadmError, match=message):
        load(changed)


def test_a_checkpoint_without_ema_says_what_to_do(load, state):
    raw = {key: tensor for key, tensor in state.items() if not key.startswith("model_ema.")}
    with pytest.raises(EdadmError, match=r"no EMA weights \(model_ema.*ema=False"):
        load(raw)
    assert load(raw, replace(LDM, ema=False)).unet is not None


def test_scale_factor_of_the_params_needs_no_buffer_and_may_not_differ_from_one(load, state):
    fixed = replace(LDM, scale_factor=0.18215)
    with pytest.raises(EdadmError, match=r"scale_factor 0\.25, expected 0\.18215"):
        load(state, fixed)
    del state["scale_factor"]
    assert load(state, fixed).scale_factor == 0.18215


def test_a_checkpoint_of_half_precision_keeps_the_exact_schedule(load, state):
    model = load({key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in state.items()})
    assert torch.equal(model.alphas_cumprod, state["alphas_cumprod"])
    assert model.unet.conv_out.bias.dtype == torch.float32


def test_another_of_the_known_models_is_named(load, state):
    with pytest.raises(EdadmError, match=r"its first convolution .* is of an unknown model"):
        load(state, LDM_MODELS["sd14"])
    key = "model.diffusion_model.input_blocks.0.0.weight"
    with pytest.raises(EdadmError, match=r"first convolution \(320, 4, 3, 3\) is that of sd14, expected \(192, 4"):
        load(state | {key: torch.zeros(320, 4, 3, 3)}, LDM_MODELS["lsun_church_ldm8"])


def test_another_architecture_is_named(load):
    with pytest.raises(EdadmError, match=r"is an original DiT checkpoint .*, not a CompVis latent diffusion"):
        load(originals.dit_state())


def test_entries_outside_of_the_models_are_reported(load, state, caplog):
    with caplog.at_level(logging.WARNING):
        load(state | {"ddim_sigmas": torch.zeros(3), "logvar": torch.zeros(1000)})
    assert "2 entries outside of its models are not read: ddim_sigmas, logvar" in caplog.text


def test_text_encoder_of_stable_diffusion():
    prefix = "cond_stage_model.transformer.text_model."
    state = {f"{prefix}embeddings.position_ids": torch.arange(77), f"{prefix}final_layer_norm.bias": torch.zeros(3)}
    assert list(text_encoder_state(state | {"betas": torch.zeros(1)})) == ["final_layer_norm.bias"]


def test_known_models_are_those_of_the_paper():
    """Latents, weights in use and scale factors of the released scripts (golden README, ldm, 7.2 and 9)."""
    described = {
        name: (p.unet.image_size, p.unet.in_channels, p.ema, p.scale_factor, p.n_classes)
        for name, p in LDM_MODELS.items()
    }
    assert described == {
        "lsun_bedroom_ldm4": (64, 3, True, 1.0, None),
        "lsun_church_ldm8": (32, 4, True, None, None),
        "imagenet_ldm4": (64, 3, False, 1.0, 1001),
        "sd14": (64, 4, False, 0.18215, None),
    }

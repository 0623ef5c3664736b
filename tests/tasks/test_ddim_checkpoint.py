from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file

from edadm.errors import EdadmError
from edadm.tasks.ddim_checkpoint import convert, load_checkpoint, load_state, module_name
from tests.toys import tiny_unet

LEVELS = 2


@pytest.fixture
def official_state():
    """The toy network's weights under their original names, attention projections as 1x1 convolutions."""
    model = tiny_unet(seed=5)
    names = {
        name: original
        for original in _original_modules()
        if (name := module_name(original, LEVELS)) and name in dict(model.named_modules())
    }
    state = {}
    for key, tensor in model.state_dict().items():
        module, _, kind = key.rpartition(".")
        is_projection = ".attentions." in key and kind == "weight" and tensor.ndim == 2
        state[f"{names[module]}.{kind}"] = tensor[:, :, None, None] if is_projection else tensor
    return state, model


def _original_modules():
    yield from ("temb.dense.0", "temb.dense.1", "conv_in", "norm_out", "conv_out")
    block = ("norm1", "conv1", "temb_proj", "norm2", "conv2", "nin_shortcut")
    attention = ("norm", "q", "k", "v", "proj_out")
    for part in ("block_1", "block_2"):
        yield from (f"mid.{part}.{layer}" for layer in block)
    yield from (f"mid.attn_1.{layer}" for layer in attention)
    for level in range(LEVELS):
        for direction, resampler in (("down", "downsample"), ("up", "upsample")):
            yield f"{direction}.{level}.{resampler}.conv"
            for j in range(3):
                yield from (f"{direction}.{level}.block.{j}.{layer}" for layer in block)
                yield from (f"{direction}.{level}.attn.{j}.{layer}" for layer in attention)


@pytest.mark.parametrize("form", ["safetensors", "state", "training"])
def test_checkpoint_file_gives_the_original_network(official_state, form, tmp_path):
    state, expected = official_state
    path = tmp_path / ("model.safetensors" if form == "safetensors" else "model.ckpt")
    if form == "safetensors":
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    else:
        prefixed = {f"module.{key}": tensor for key, tensor in state.items()}
        torch.save(state if form == "state" else [{"other": torch.zeros(1)}, prefixed], path)
    loaded = load_checkpoint(tiny_unet(seed=6), path)
    for key, tensor in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


def test_up_levels_are_counted_the_other_way_round():
    assert module_name("up.3.block.1.nin_shortcut", 4) == "up_blocks.0.resnets.1.conv_shortcut"
    assert module_name("down.3.block.1.temb_proj", 4) == "down_blocks.3.resnets.1.time_emb_proj"


@pytest.mark.parametrize("name", ["encoder.conv", "up.0.other.conv", "mid.block_3.conv1"])
def test_unknown_name_is_an_error(name):
    with pytest.raises(EdadmError, match="unknown module"):
        module_name(name, LEVELS)


def test_wrong_keys_and_values_are_named(official_state):
    state = convert(official_state[0], LEVELS)
    cases = {
        "missing conv_in.weight": lambda s: s.pop("conv_in.weight"),
        "unexpected extra.weight": lambda s: s.update({"extra.weight": torch.zeros(1)}),
        r"conv_in.bias has shape \(3,\), expected \(8,\)": lambda s: s.update({"conv_in.bias": torch.zeros(3)}),
        "conv_in.bias has NaN": lambda s: s.update({"conv_in.bias": torch.full((8,), float("nan"))}),
    }
    for message, spoil in cases.items():
        spoiled = copy.copy(state)
        spoil(spoiled)
        with pytest.raises(EdadmError, match=message):
            load_state(tiny_unet(), spoiled, "a checkpoint")


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(EdadmError, match="no checkpoint at"):
        load_checkpoint(tiny_unet(), tmp_path / "none.ckpt")

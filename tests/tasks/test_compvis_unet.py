from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edadm.errors import EdadmError
from edadm.tasks.compvis_unet import LSUN_BEDROOM, LSUN_CHURCH, SD_V1, convert_unet, source_of, unet_config, unet_params
from tests.tasks import originals


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("time_embedding.linear_2.bias", "time_embed.2.bias"),
        ("down_blocks.0.downsamplers.0.conv1.weight", "input_blocks.3.0.in_layers.2.weight"),
        ("down_blocks.4.resnets.1.time_emb_proj.bias", "input_blocks.14.0.emb_layers.1.bias"),
        ("up_blocks.0.upsamplers.0.norm1.weight", "output_blocks.2.1.in_layers.0.weight"),
        ("up_blocks.1.attentions.0.group_norm.weight", "output_blocks.3.1.norm.weight"),
        ("up_blocks.1.upsamplers.0.conv2.weight", "output_blocks.5.2.out_layers.3.weight"),
        ("mid_block.attentions.0.to_k.weight", "middle_block.1.qkv.weight"),
        ("conv_norm_out.weight", "out.0.weight"),
    ],
)
def test_names_of_the_church_network(name, original):
    assert source_of(name, LSUN_CHURCH).key == original


def test_resampling_convolutions_and_transformers_of_stable_diffusion():
    assert source_of("down_blocks.1.downsamplers.0.conv.weight", SD_V1).key == "input_blocks.6.0.op.weight"
    assert source_of("up_blocks.0.upsamplers.0.conv.bias", SD_V1).key == "output_blocks.2.1.conv.bias"
    name = "attentions.1.transformer_blocks.0.attn2.to_out.0.weight"
    original = "input_blocks.2.1.transformer_blocks.0.attn2.to_out.0.weight"
    assert source_of(f"down_blocks.0.{name}", SD_V1).key == original


def test_q_k_and_v_are_taken_head_by_head():
    params = replace(LSUN_BEDROOM, num_head_channels=2)
    fused = torch.arange(12.0).reshape(12, 1, 1)  # 4 channels, two heads: q0 q0 k0 k0 v0 v0 q1 q1 k1 k1 v1 v1
    name = "mid_block.attentions.0.to_{}.weight"
    taken = {part: source_of(name.format(part), params).take(fused) for part in "qkv"}
    assert taken["q"].flatten().tolist() == [0, 1, 6, 7]
    assert taken["k"].flatten().tolist() == [2, 3, 8, 9]
    assert taken["v"].flatten().tolist() == [4, 5, 10, 11]
    assert taken["q"].shape == (4, 1)
    four_heads = source_of(name.format("k"), replace(params, num_head_channels=-1, num_heads=4)).take(fused)
    assert four_heads.flatten().tolist() == [1, 4, 7, 10]


def test_heads_by_width_become_a_number_per_level_with_transformers():
    params = replace(SD_V1, num_heads=-1, num_head_channels=64)
    assert unet_config(params)[1]["attention_head_dim"] == [5, 10, 20, 20]
    assert unet_config(SD_V1)[1]["attention_head_dim"] == 8


def test_a_network_with_transformers_is_filled_whole():
    state = originals.unet_state()
    model = convert_unet(state, originals.UNET, "golden")
    assert torch.equal(model.conv_out.weight, state["out.2.weight"])
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in state.values())
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_more_or_fewer_levels_than_asked_are_named():
    with pytest.raises(EdadmError, match=r"x\.ckpt does not fit UNet2DConditionModel: .*missing input_blocks\.4"):
        convert_unet(originals.unet_state(), replace(originals.UNET, channel_mult=(1, 2, 4)), "x.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_new_attention_order": True}, "use_new_attention_order=True"),
        ({"num_classes": 1000}, "num_classes=1000"),
        ({"adm_in_channels": 2816}, "adm_in_channels=2816"),
        ({"num_head_channels": 32}, "exactly one of num_heads and num_head_channels"),
        ({"use_spatial_transformer": True}, "use_spatial_transformer and context_dim"),
        ({"context_dim": 4, "use_spatial_transformer": True, "resblock_updown": True}, "a spatial transformer with"),
    ],
)
def test_parameters_that_cannot_be_converted_are_named(change, message):
    params = {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "attention_resolutions": [1],
        "num_res_blocks": 2,
        "num_heads": 8,
        "use_checkpoint": True,
    }
    assert unet_params(params).norm_groups == 32
    with pytest.raises(EdadmError, match=message):
        unet_params(params | change)

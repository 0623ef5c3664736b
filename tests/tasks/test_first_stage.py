from __future__ import annotations

import pytest
import torch

from edadm.errors import EdadmError
from edadm.tasks.first_stage import KL_F8, VQ_F4, first_stage_params, load_first_stage, source_of
from tests.tasks import originals

DDCONFIG = {"double_z": False, "z_channels": 3, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
DDCONFIG |= {"ch_mult": [1, 2, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("encoder.down_blocks.0.resnets.1.conv_shortcut.weight", "encoder.down.0.block.1.nin_shortcut.weight"),
        ("encoder.down_blocks.2.downsamplers.0.conv.bias", "encoder.down.2.downsample.conv.bias"),
        ("decoder.up_blocks.0.resnets.2.norm1.weight", "decoder.up.3.block.2.norm1.weight"),
        ("decoder.up_blocks.3.resnets.0.conv1.weight", "decoder.up.0.block.0.conv1.weight"),
        ("decoder.mid_block.resnets.1.norm2.bias", "decoder.mid.block_2.norm2.bias"),
        ("encoder.mid_block.attentions.0.to_out.0.weight", "encoder.mid.attn_1.proj_out.weight"),
        ("encoder.mid_block.attentions.0.group_norm.bias", "encoder.mid.attn_1.norm.bias"),
        ("decoder.conv_norm_out.weight", "decoder.norm_out.weight"),
        ("post_quant_conv.weight", "post_quant_conv.weight"),
    ],
)
def test_names_of_the_original(name, original):
    assert source_of(name, KL_F8).key == original


@pytest.mark.parametrize("params", [originals.VQ, originals.KL])
def test_a_checkpoint_of_its_own_loses_only_its_loss(params, tmp_path):
    state = originals.first_stage_state(params)
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": state | {"loss.discriminator.main.0.weight": torch.zeros(2)}, "epoch": 1}, path)
    model = load_first_stage(path, params, scale_factor=0.5)
    assert model.config.scaling_factor == 0.5
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in state.values())
    original = state["encoder.mid.attn_1.q.weight"]
    assert torch.equal(model.encoder.mid_block.attentions[0].to_q.weight, original[:, :, 0, 0])
    if params.n_embed is not None:
        assert torch.equal(model.quantize.embedding.weight, state["quantize.embedding.weight"])


def test_a_kl_model_is_not_read_as_a_vq_model(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(originals.first_stage_state(originals.KL), path)
    with pytest.raises(EdadmError, match=r"does not fit VQModel: .*missing quantize\.embedding\.weight"):
        load_first_stage(path, originals.VQ, 1.0)


def test_a_whole_latent_diffusion_model_is_named(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(originals.ldm_state(), path)
    with pytest.raises(EdadmError, match=r"is a CompVis latent diffusion checkpoint .*, not a CompVis first stage"):
        load_first_stage(path, originals.VQ, 1.0)


def test_parameters_of_the_yaml():
    assert first_stage_params({"embed_dim": 3, "n_embed": 8192, "monitor": "val/rec", "ddconfig": DDCONFIG}) == VQ_F4
    kl = DDCONFIG | {"double_z": True, "z_channels": 4, "ch_mult": [1, 2, 4, 4]}
    assert first_stage_params({"embed_dim": 4, "lossconfig": {}, "ddconfig": kl}) == KL_F8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_resolutions": [16]}, r"attn_resolutions=\[16\]"),
        ({"double_z": True}, "double_z=True"),
        ({"tanh_out": True}, "tanh_out=True"),
    ],
)
def test_parameters_that_cannot_be_converted_are_named(change, message):
    with pytest.raises(EdadmError, match=message):
        first_stage_params({"embed_dim": 3, "n_embed": 8, "ddconfig": DDCONFIG | change})


def test_a_kl_model_with_unequal_channels_is_an_error():
    with pytest.raises(EdadmError, match="embed_dim=2, z_channels=3"):
        first_stage_params({"embed_dim": 2, "ddconfig": DDCONFIG | {"double_z": True}})

from __future__ import annotations

import json

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from safetensors.torch import load_file, save_file

from edadm.errors import EdadmError
from edadm.tasks.compvis_unet import UNetParams, unet_config
from edadm.tasks.model_folder import ATTENTION_HEADS, empty_model, load_model
from tests.toys import tiny_unet

CHURCH = UNetParams(
    image_size=8,
    in_channels=4,
    out_channels=4,
    model_channels=8,
    attention_resolutions=(1,),
    num_res_blocks=1,
    channel_mult=(1, 2),
    num_heads=4,
    use_scale_shift_norm=True,
    resblock_updown=True,
    norm_groups=4,
)


@pytest.fixture
def church(tmp_path):
    """A network with four heads everywhere, and the folder it was saved to."""
    model = empty_model(*unet_config(CHURCH)).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(generator=generator)
    model.save_pretrained(tmp_path)
    return model, tmp_path


@torch.no_grad()
def output(model):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return model(x, torch.tensor([3, 700])).sample


def test_heads_survive_saving_with_our_reader_only(church):
    model, folder = church
    attentions = [module for module in load_model(folder).modules() if isinstance(module, Attention)]
    assert {attention.to_q.out_features for attention in attentions} == {8, 16}
    for attention in attentions:
        assert attention.heads == 4 and attention.scale == (attention.to_q.out_features / 4) ** -0.5
    assert torch.equal(output(load_model(folder)), output(model))
    stock = UNet2DModel.from_pretrained(folder)
    assert (output(stock) - output(model)).abs().max() > 0.01
    stock.save_pretrained(folder / "again")  # the field passes through stock diffusers
    assert json.loads((folder / "again" / "config.json").read_text())[ATTENTION_HEADS] == 4


def test_explicit_matmuls_use_the_scale_of_the_heads(church):
    model, folder = church
    explicit = load_model(folder)
    for module in explicit.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())
    assert (output(explicit) - output(model)).abs().max() < 1e-4 * output(model).abs().max()


def test_a_stock_folder_is_read_as_it_is(tmp_path):
    model = tiny_unet(seed=3)
    model.save_pretrained(tmp_path)
    read = load_model(tmp_path)
    assert ATTENTION_HEADS not in read.config
    assert all(torch.equal(tensor, read.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_heads_that_do_not_divide_the_channels_are_an_error():
    class_name, config = unet_config(CHURCH)
    with pytest.raises(EdadmError, match=r"attentions.* channels, not divisible by 3 heads"):
        empty_model(class_name, config | {ATTENTION_HEADS: 3})


@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_missing_file_is_named(church, name):
    (church[1] / name).unlink()
    with pytest.raises(EdadmError, match=f"{name} is missing"):
        load_model(church[1])


def test_bad_files_are_named(church):
    folder = church[1]
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({key: t for key, t in tensors.items() if key != "conv_in.bias"} | {"other": torch.zeros(1)}, weights)
    with pytest.raises(EdadmError, match=r"missing conv_in\.bias; unexpected other"):
        load_model(folder)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(EdadmError, match="truncated"):
        load_model(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(EdadmError, match="is no JSON"):
        load_model(folder)
    (folder / "config.json").write_text('{"_class_name": "Flux"}')
    with pytest.raises(EdadmError, match="cannot build a Flux"):
        load_model(folder)

from __future__ import annotations

import argparse

import pytest
import torch
from diffusers import DiTTransformer2DModel

from edadm.errors import EdadmError
from edadm.quant import io
from edadm.quant.calibrate import set_weight_ranges
from edadm.quant.families.dit import FAMILY
from edadm.quant.network import Bits, QuantModel
from edadm.quant.ranges import MinMax
from edadm.tasks.dit_checkpoint import DIT_XL_2_256, convert_dit, dit_params, load_dit
from edadm.tasks.model_folder import load_model
from tests.tasks import originals


@torch.no_grad()
def output(model):
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return model(x, torch.tensor([3, 700]), torch.tensor([1, 10])).sample


def test_shared_embedders_go_to_every_block_and_qkv_in_thirds():
    state = originals.dit_state()
    model = convert_dit(state, originals.DIT, "dit.pt")
    for block in model.transformer_blocks:
        assert torch.equal(block.norm1.emb.timestep_embedder.linear_1.weight, state["t_embedder.mlp.0.weight"])
        assert torch.equal(
            block.norm1.emb.class_embedder.embedding_table.weight, state["y_embedder.embedding_table.weight"]
        )
    assert torch.equal(model.transformer_blocks[1].attn1.to_k.bias, state["blocks.1.attn.qkv.bias"][16:32])
    assert FAMILY.parameters(model) == sum(tensor.numel() for tensor in state.values())


def test_time_frequencies_survive_saving_with_our_reader_only(tmp_path):
    model = convert_dit(originals.dit_state(), originals.DIT, "dit.pt")
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert [block.norm1.emb.time_proj.downscale_freq_shift for block in again.transformer_blocks] == [0, 0]
    assert torch.equal(output(again), output(model))
    stock = DiTTransformer2DModel.from_pretrained(tmp_path).eval()
    difference = (output(stock) - output(model)).abs().flatten(1).amax(1)
    assert difference[1] > 0.01  # grows with the time


def test_time_frequencies_survive_quantization_without_a_field_that_diffusers_warns_of(tmp_path):
    network = QuantModel.wrap(convert_dit(originals.dit_state(), originals.DIT, "dit.pt"), Bits(8, 32))
    set_weight_ranges(network, MinMax())
    network.set_state(weights=True, activations=True)
    again = io.load(io.save(network, tmp_path))
    assert [block.norm1.emb.time_proj.downscale_freq_shift for block in again.model.transformer_blocks] == [0, 0]
    assert torch.equal(output(again), output(network))
    assert not any("edadm" in field for field in io.read_description(tmp_path)["model_config"])


def test_ema_weights_of_a_training_checkpoint_are_taken(tmp_path):
    ema, raw = originals.dit_state(), originals.dit_state()
    ema["final_layer.linear.bias"] = torch.full_like(raw["final_layer.linear.bias"], 0.5)
    path = tmp_path / "0400000.pt"
    torch.save({"model": raw, "ema": ema, "opt": {"state": {}}, "args": argparse.Namespace(epochs=3)}, path)
    model = load_dit(path, originals.DIT)
    assert (model.proj_out_2.bias == 0.5).all() and not model.training


def test_other_positions_are_an_error():
    state = originals.dit_state()
    state["pos_embed"] = state["pos_embed"] + 0.1
    with pytest.raises(EdadmError, match="pos_embed is absent or not the sine table"):
        convert_dit(state, originals.DIT, "dit.pt")


def test_another_size_and_another_architecture_are_named(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(originals.dit_state(), path)
    with pytest.raises(EdadmError, match=r"does not fit DiTTransformer2DModel: missing blocks\.2\.adaLN"):
        load_dit(path)
    torch.save(originals.ldm_state(), path)
    with pytest.raises(EdadmError, match=r"is a CompVis latent diffusion checkpoint .*, not an original DiT"):
        load_dit(path)


def test_parameters_of_the_original():
    params = {"input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 1152, "depth": 28, "num_heads": 16}
    assert dit_params(params | {"mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 1000}) == DIT_XL_2_256
    for change, message in (({"mlp_ratio": 2.0}, "mlp_ratio=2.0"), ({"class_dropout_prob": 0.0}, "no null class")):
        with pytest.raises(EdadmError, match=message):
            dit_params(params | change)

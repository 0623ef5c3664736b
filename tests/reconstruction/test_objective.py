from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edadm.quant.network import Bits, QuantModel
from edadm.reconstruction.objective import LayerTap, layer_channels, loss_layers, output_channels, tensor_loss
from tests.toys import DENOISERS


@pytest.mark.parametrize("p", [2.0, 2.4])
def test_loss_sums_over_channels_and_averages_over_the_rest(p):
    a, b = torch.randn(2, 3, 5, 4, 4, dtype=torch.float64)
    expected = (a - b).abs().pow(p).sum(1).mean()
    assert torch.allclose(tensor_loss(a, b, 5, p), expected)
    as_tokens = [x.flatten(2).transpose(1, 2) for x in (a, b)]
    assert torch.allclose(tensor_loss(*as_tokens, 5, p), expected)


@pytest.fixture
def units(make_network):
    return make_network(ranges=False).units("block")


def names(layers):
    return [layer.name.rsplit(".", 1)[1].removesuffix("0") for layer in layers]


def test_registration_excludes_the_last_registered_layer_and_main_path_the_one_that_ends_it(units):
    resnet = next(unit for unit in units if any("conv_shortcut" in layer.name for layer in unit.layers))
    assert names(loss_layers(resnet, "registration")) == ["conv1", "time_emb_proj", "conv2"]
    assert names(loss_layers(resnet, "main_path")) == ["conv1", "time_emb_proj", "conv_shortcut"]
    attention = next(unit for unit in units if unit.matmuls)
    for rule in ("registration", "main_path"):
        assert names(loss_layers(attention, rule)) == ["to_q", "to_k", "to_v"]
    assert loss_layers(next(unit for unit in units if unit.kind == "layer"), "registration") == ()


def test_channels_of_units(units):
    layer = next(unit for unit in units if unit.kind == "layer")
    assert output_channels(layer, torch.empty(2, 7)) == len(layer.layers[0].weight)
    block = next(unit for unit in units if unit.kind == "block")
    assert output_channels(block, torch.empty(2, 16, 4, 4)) == 16
    assert output_channels(block, torch.empty(2, 9, 16)) == 16
    assert output_channels(replace(block, kind="matmul"), torch.empty(2, 3, 9, 5)) == 15


@pytest.fixture
def blocks():
    """The units of other families by name of family and unit."""
    return {
        name: {unit.name: unit for unit in QuantModel.wrap(DENOISERS[name].build(), Bits(4, 8)).units("block")}
        for name in ("unet2d_condition", "dit", "sd3")
    }


def test_tokens_of_transformers_are_what_the_original_code_sums_over(units, blocks):
    """methods.md 3.0: axis 1 of the original layout, tokens in a transformer, channels of what was a 1x1 convolution."""
    attention = next(unit for unit in units if unit.matmuls)
    assert layer_channels(attention, attention.layers[0], torch.empty(2, 9, 16)) == 16
    unet = blocks["unet2d_condition"]
    transformer = unet["mid_block.attentions.0.transformer_blocks.0"]
    assert output_channels(transformer, torch.empty(2, 9, 16)) == 9
    assert layer_channels(transformer, transformer.layers[-1], torch.empty(2, 77, 16)) == 77
    assert output_channels(unet["mid_block.attentions.0.proj_in"], torch.empty(2, 16, 3, 3)) == 16
    block = blocks["dit"]["transformer_blocks.0"]
    modulation = next(layer for layer in block.layers if layer.role == "modulation")
    assert layer_channels(block, modulation, torch.empty(2, 48)) == 48


def test_the_original_transformer_registers_cross_attention_last(blocks):
    transformer = blocks["unet2d_condition"]["mid_block.attentions.0.transformer_blocks.0"]
    left_out = {
        rule: {layer.name for layer in transformer.layers} - {layer.name for layer in loss_layers(transformer, rule)}
        for rule in ("registration", "main_path")
    }
    assert left_out == {
        "registration": {f"{transformer.name}.attn2.to_out.0"},
        "main_path": {f"{transformer.name}.ff.net.2"},
    }
    for rule, last in (("registration", "ff_context.net.2"), ("main_path", "ff.net.2")):
        joint = blocks["sd3"]["transformer_blocks.0"]
        assert {layer.name for layer in joint.layers} - {layer.name for layer in loss_layers(joint, rule)} == {
            f"{joint.name}.{last}"
        }


def test_tap_records_in_the_order_of_layers_and_stops_when_all_have_run(units):
    resnet = next(unit for unit in units if any("conv_shortcut" in layer.name for layer in unit.layers))
    layers, last = resnet.layers[:2], resnet.layers[-1]
    x, temb = torch.randn(2, layers[0].weight.shape[1], 4, 4), torch.randn(2, layers[1].weight.shape[1])
    ran = []
    last.register_forward_hook(lambda *_: ran.append(1))
    with LayerTap(layers[::-1]) as tap:
        resnet.module(x, temb)
        resnet.module(x[:1], temb[:1])
        projection, convolution = tap.take()
        assert projection.shape == (3, len(layers[1].weight)) and convolution.shape[:2] == (3, len(layers[0].weight))
        tap.listening = False
        resnet.module(x, temb)
    assert len(ran) == 3
    with LayerTap(layers, stop=True) as tap:
        with pytest.raises(LayerTap.Recorded):
            resnet.module(x, temb)
        assert len(tap.take()) == 2 and len(ran) == 3
    assert not layers[0]._forward_hooks

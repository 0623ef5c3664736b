from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edadm.reconstruction.objective import LayerTap, loss_layers, output_channels, tensor_loss


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

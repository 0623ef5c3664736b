from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

from edadm.errors import EdadmError
from edadm.quant import io
from edadm.quant.calibrate import set_activation_ranges, set_weight_ranges
from edadm.quant.layers import LayerBits, QuantLayer
from edadm.quant.network import Bits, QuantModel, SitePlan, load_unit_state, unit_state
from edadm.quant.ranges import MSE
from tests.toys import tiny_unet

EDGE = {"time_mlp_1": {"weight": 8}, "output": {"weight": 8, "act": 32}}


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(6, 3, 8, 8, generator=generator), torch.tensor([0.0, 10, 100, 400, 700, 999])


def quantized(bits=None, plan=None, rows=None):
    network = QuantModel.wrap(tiny_unet(), bits or Bits(4, 8), plan or SitePlan(EDGE))
    set_weight_ranges(network, MSE())
    if rows is not None:
        set_activation_ranges(network, MSE(), [partial(network, *rows)])
    return network


@torch.no_grad()
def test_switched_off_it_equals_the_wrapped_network(rows):
    model = tiny_unet()
    expected = copy.deepcopy(model)(*rows).sample
    network = QuantModel.wrap(model, Bits(4, 8))
    torch.testing.assert_close(network(*rows).sample, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("bits", [Bits(32, 32), Bits(16, 16)])
def test_float_bits_change_nothing(bits, rows):
    model = tiny_unet()
    expected = copy.deepcopy(model)(*rows).sample
    network = QuantModel.wrap(model, bits, SitePlan(EDGE))
    set_weight_ranges(network, MSE())
    network.set_state(weights=True, activations=True)
    torch.testing.assert_close(network(*rows).sample, expected, rtol=1e-5, atol=1e-5)
    assert {site.bits for site in network.sites()} <= {16, 32}


@torch.no_grad()
def test_more_bits_are_closer_to_full_precision(rows):
    errors = []
    for bits in (Bits(3, 3), Bits(4, 8), Bits(8, 8)):
        network = quantized(bits, SitePlan(), rows)
        quantized_eps = network(*rows).sample
        network.set_state(weights=False, activations=False)
        errors.append(float((quantized_eps - network(*rows).sample).square().mean()))
    assert errors == sorted(errors, reverse=True)


def test_edge_rule_is_by_role():
    network = QuantModel.wrap(tiny_unet(), Bits(4, 6), SitePlan(EDGE))
    bits = {site.name: site.bits for site in network.sites()}
    assert bits["time_embedding.linear_1.weight_quantizer"] == 8
    assert bits["conv_in.weight_quantizer"] == 4
    assert bits["conv_out.weight_quantizer"] == 8 and bits["conv_out.act_quantizer"] == 32
    assert bits["up_blocks.1.resnets.0.conv1.act_quantizer"] == 6


def test_edge_rule_never_quantizes_a_float_tensor():
    network = QuantModel.wrap(tiny_unet(), Bits(32, 8), SitePlan({"output": {"weight": 8, "act": 8}}))
    assert {site.bits for site in network.sites() if site.kind == "weight"} == {32}


def test_only_shortcuts_of_the_up_path_are_split():
    network = QuantModel.wrap(tiny_unet(), Bits(4, 8))
    splits = {name: layer.split for name, layer in network.layers.items() if layer.split}
    assert splits == {
        "up_blocks.0.resnets.0.conv_shortcut": 16,
        "up_blocks.0.resnets.1.conv_shortcut": 16,
        "up_blocks.1.resnets.0.conv_shortcut": 16,
        "up_blocks.1.resnets.1.conv_shortcut": 8,
    }
    assert not any(
        layer.split for layer in QuantModel.wrap(tiny_unet(), Bits(4, 8), SitePlan(split=False)).layers.values()
    )


def test_every_site_belongs_to_one_unit_in_execution_order(rows):
    network = QuantModel.wrap(tiny_unet(), Bits(4, 8))
    for granularity in ("block", "layer"):
        units, called = network.units(granularity), []
        hooks = [unit.module.register_forward_pre_hook(partial(_note, called, unit.name)) for unit in units]
        with torch.no_grad():
            network(*rows)
        for hook in hooks:
            hook.remove()
        assert called == [unit.name for unit in units]
    names = [site.name for site in network.sites()]
    assert len(names) == len(set(names))


def _note(called, name, _module, _inputs):
    called.append(name)


@torch.no_grad()
def test_split_layer_is_the_sum_of_its_halves():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 4, 1)
    layer = QuantLayer(conv, "shortcut", "shortcut", LayerBits(4, 8), split=2)
    layer.set_weight_ranges(MSE())
    x = torch.cat([torch.randn(2, 2, 5, 5), 100 * torch.randn(2, 4, 5, 5)], 1)
    layer.weight_enabled = True
    for q, part in zip(layer.act_quantizers, (x[:, :2], x[:, 2:])):
        MSE().update(q, part)
        q.enabled = True
    halves = [
        nn.functional.conv2d(q(part), w.hard(weight))
        for q, w, part, weight in zip(
            layer.act_quantizers,
            layer.weight_quantizers,
            (x[:, :2], x[:, 2:]),
            (conv.weight[:, :2], conv.weight[:, 2:]),
        )
    ]
    torch.testing.assert_close(layer(x), sum(halves) + conv.bias[:, None, None], rtol=1e-4, atol=1e-4)


def test_unknown_layer_is_an_error_naming_it():
    model = tiny_unet()
    model.mid_block.extra = nn.Conv2d(2, 2, 1)
    with pytest.raises(EdadmError, match=r"no role for mid_block\.extra"):
        QuantModel.wrap(model, Bits(4, 8))


def test_unknown_family_is_an_error_naming_it():
    with pytest.raises(EdadmError, match="Linear"):
        QuantModel.wrap(nn.Linear(2, 2), Bits(4, 8))


def test_hidden_attention_is_an_error():
    model = tiny_unet()

    class FlashProcessor:
        pass

    model.mid_block.attentions[0].processor = FlashProcessor()
    with pytest.raises(EdadmError, match=r"mid_block\.attentions\.0 uses FlashProcessor"):
        QuantModel.wrap(model, Bits(4, 8))


@pytest.mark.parametrize("width", [1, 9, 0, -4])
def test_impossible_bits_are_an_error(width):
    with pytest.raises(EdadmError, match=r"bits\.weight"):
        Bits(width, 8)


def test_nan_in_a_weight_is_named():
    model = tiny_unet()
    model.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    network = QuantModel.wrap(model, Bits(4, 8))
    with pytest.raises(EdadmError, match="conv_in"):
        set_weight_ranges(network, MSE())


@torch.no_grad()
def test_unit_state_round_trip(rows):
    network = quantized(rows=rows)
    unit = network.units("block")[3]
    for layer in unit.layers:
        layer.weight_enabled = True
        for alpha in layer.start_rounding():
            alpha.neg_()
        layer.finish_rounding()
    for q in unit.activation_quantizers:
        q.scale.mul_(1.1)
    expected, state = network(*rows).sample, unit_state(unit)
    other = quantized(rows=rows)
    assert not torch.equal(other(*rows).sample, expected)
    load_unit_state(other.units("block")[3], state)
    assert torch.equal(other(*rows).sample, expected)


def test_save_and_load_in_a_fresh_process_is_equal_to_the_bit(rows, tmp_path):
    saved = {}
    for bits in (Bits(4, 8), Bits(3, 32), Bits(32, 8)):
        network = quantized(bits, rows=rows)
        for layer in network.units("block")[3].layers:
            for alpha in layer.start_rounding():
                alpha.data.neg_()
            layer.finish_rounding()
        with torch.no_grad():
            expected = network(*rows).sample
        folder = io.save(network, tmp_path / f"w{bits.weight}a{bits.act}", method="test")
        saved[str(folder)] = expected
    torch.save([*rows, saved], tmp_path / "io.pt")
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from edadm.quant import io\n"
        "x, t, saved = torch.load(sys.argv[1])\n"
        "with torch.no_grad(): found = {folder: io.load(folder)(x, t).sample for folder in saved}\n"
        "sys.exit(' '.join(folder for folder in saved if not torch.equal(found[folder], saved[folder])) or 0)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "io.pt"], check=True)


def test_loaded_model_refuses_full_precision(rows, tmp_path):
    network = quantized(rows=rows)
    loaded = io.load(io.save(network, tmp_path))
    with pytest.raises(EdadmError, match="full-precision"):
        loaded.set_state(weights=False, activations=False)


def test_broken_model_file_is_an_error(rows, tmp_path):
    io.save(quantized(rows=rows), tmp_path)
    (tmp_path / io.WEIGHTS).write_bytes(b"no safetensors")
    with pytest.raises(EdadmError, match="no readable quantized model"):
        io.load(tmp_path)


def test_ranges_that_are_set_again_forget_the_first(rows):
    x, t = rows
    network, fresh = quantized(rows=(10 * x, t)), quantized(rows=rows)
    set_activation_ranges(network, MSE(), [partial(network, *rows)])
    for again, once in zip(network.activation_quantizers, fresh.activation_quantizers, strict=True):
        assert torch.equal(again.scale, once.scale), again.name

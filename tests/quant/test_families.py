"""Every denoiser family: complete sites, units in execution order, splits, equal outputs, files."""

from __future__ import annotations

import copy
import logging
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from edadm import cost
from edadm.errors import EdadmError
from edadm.quant import io
from edadm.quant.calibrate import set_activation_ranges, set_weight_ranges
from edadm.quant.families import FAMILIES
from edadm.quant.network import Bits, QuantModel, SitePlan
from edadm.quant.ranges import MinMax
from tests.toys import (
    DENOISERS,
    church_unet,
    conditional_unet,
    diffusion_transformer,
)

# Convolutions and linear layers, attentions, split shortcuts, units: counted by hand from the configurations.
COUNTS = {
    "unet2d": (4 + 4 + 8 + 10 + 17 + 8, 4, 4, 3 + 2 + 2 + 3 + 5 + 2 + 1),
    "unet2d_church": (4 + 10 + 4 + 10 + 11 + 16, 4, 4, 3 + 3 + 1 + 3 + 3 + 4 + 1),
    "unet2d_condition": (4 + 4 + 16 + 18 + 33 + 8, 8, 4, 3 + 2 + 4 + 5 + 9 + 2 + 1),
    "dit": (1 + 2 * 9 + 2, 2, 0, 1 + 2 + 2),
    "pixart": (1 + 2 + 1 + 2 + 2 * 10 + 1, 4, 0, 1 + 2 + 1 + 2 + 2 + 1),
    "sd3": (1 + 4 + 1 + 18 + 11 + 2, 3, 0, 1 + 4 + 1 + 2 + 2),
    "flux": (1 + 6 + 1 + 14 + 6 + 2, 2, 0, 1 + 6 + 1 + 2 + 2),
}

EVERY_DENOISER = pytest.mark.parametrize("name", DENOISERS)


@pytest.fixture(autouse=True)
def _quiet():
    """Without diffusers' warning about position numbers with a batch axis."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def quantized(name, bits=Bits(4, 8), rows=4):  # noqa: B008
    denoiser = DENOISERS[name]
    network, inputs = QuantModel.wrap(denoiser.build(), bits), denoiser.inputs(rows)
    set_weight_ranges(network, MinMax())
    set_activation_ranges(network, MinMax(), [lambda: network(**inputs)])
    return network, inputs


def test_every_family_has_a_small_denoiser():
    models = {type(denoiser.build()).__name__ for denoiser in DENOISERS.values()}
    assert models == {family.model for family in FAMILIES.values()}
    assert COUNTS.keys() == DENOISERS.keys()


@EVERY_DENOISER
def test_every_layer_and_product_is_a_site_of_one_unit(name):
    model = DENOISERS[name].build()
    kinds = nn.Linear | nn.Conv1d | nn.Conv2d
    names = {path for path, module in model.named_modules() if isinstance(module, kinds)}
    network = QuantModel.wrap(model, Bits(4, 8))
    layers, attentions, splits, units = COUNTS[name]
    assert names == network.layers.keys() and len(names) == layers
    assert len(network.matmuls) == attentions and len(network.units("block")) == units
    sites = network.sites()
    assert len({site.name for site in sites}) == len(sites) == 2 * (layers + splits) + 4 * attentions
    assert Counter(site.kind for site in sites) == {
        "weight": layers + splits, "act": layers + splits, "matmul": 4 * attentions
    }  # fmt: skip
    assert len(network.units("layer")) == layers + attentions


@EVERY_DENOISER
@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_units_are_in_execution_order(name, granularity):
    network, inputs = QuantModel.wrap(DENOISERS[name].build(), Bits(4, 8)), DENOISERS[name].inputs(1)
    units, called = network.units(granularity), []
    for unit in units:
        unit.module.register_forward_pre_hook(lambda *_, unit=unit: called.append(unit.name))
    with torch.no_grad():
        network(**inputs)
    first_calls = list(dict.fromkeys(called))
    assert first_calls == [unit.name for unit in units]
    again = [path for path, calls in Counter(called).items() if calls > 1]
    assert again == [unit.name for unit in units if network.family.layer_runs_again(unit.name)]


@torch.no_grad()
@EVERY_DENOISER
def test_switched_off_it_equals_the_wrapped_network(name):
    model, inputs = DENOISERS[name].build(), DENOISERS[name].inputs(3)
    expected = copy.deepcopy(model)(**inputs)[0]
    for bits in (Bits(4, 8), Bits(32, 32)):
        network = QuantModel.wrap(copy.deepcopy(model), bits)
        if bits.weight == 32:
            network.set_state(weights=True, activations=True)
        torch.testing.assert_close(network(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.1


# What does not reach the output: query and key before a softmax over a single key (golden/ldm README 4.5.4), and the
# queries of context tokens that the last block drops.
IDLE = {
    "unet2d_condition": r".*\.attn2\.(matmul\.[qk]|to_[qk]\.act_quantizer)",
    "sd3": r"transformer_blocks\.1\.attn\.add_q_proj\.act_quantizer",
}


@torch.no_grad()
@EVERY_DENOISER
def test_every_activation_quantizer_reaches_the_output(name):
    network, inputs = quantized(name)
    expected, idle = network(**inputs)[0], []
    for quantizer in network.activation_quantizers:
        scale = quantizer.scale.clone()
        quantizer.scale.mul_(30)
        if torch.equal(network(**inputs)[0], expected):
            idle.append(quantizer.name)
        quantizer.scale.copy_(scale)
    found = [site.name for site in network.sites() if re.fullmatch(IDLE.get(name, ""), site.name)]
    assert sorted(idle) == sorted(found)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in DENOISERS if name.startswith("unet2d")])
def test_splits_are_where_the_skip_connection_is_concatenated(name, monkeypatch):
    model, inputs, parts = DENOISERS[name].build(), DENOISERS[name].inputs(1), []
    cat = torch.cat

    def noted(tensors, dim=0):
        if tensors[0].ndim == 4 and dim == 1:
            parts.append(tensors[0].shape[1])
        return cat(tensors, dim=dim)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", noted)
        model(**inputs)
    layers = QuantModel.wrap(model, Bits(4, 8)).layers
    assert [layer.split for path, layer in layers.items() if re.match(r"up_blocks.*conv_shortcut", path)] == parts
    assert sum(layer.split is not None for layer in layers.values()) == len(parts) == COUNTS[name][2]


def test_no_family_of_transformers_is_split():
    assert all(not layer.split for layer in QuantModel.wrap(diffusion_transformer(), Bits(4, 8)).layers.values())


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("unet2d_condition", "conv_in", "conv_out"),
        ("dit", "pos_embed.proj", "proj_out_2"),
        ("pixart", "pos_embed.proj", "proj_out"),
        ("sd3", "pos_embed.proj", "proj_out"),
        ("flux", "x_embedder", "proj_out"),
    ],
)
def test_edge_layers_have_the_roles_that_rules_name(name, first, last):
    plan = SitePlan({"input": {"weight": 8}, "output": {"weight": 8, "act": 32}, "time_mlp_1": {"weight": 7}})
    network = QuantModel.wrap(DENOISERS[name].build(), Bits(4, 6), plan)
    bits = {path: (layer.bits.weight, layer.bits.act) for path, layer in network.layers.items()}
    time = [path for path in bits if re.fullmatch(r".*(time_embedding|timestep_embedder)\.linear_1", path)]
    expected = {first: (8, 6), last: (8, 32)} | dict.fromkeys(time, (7, 6))
    assert time and bits == dict.fromkeys(bits, (4, 6)) | expected


@torch.no_grad()
@EVERY_DENOISER
def test_costs_count_every_layer_and_product(name):
    denoiser = DENOISERS[name]
    model, inputs = denoiser.build(), denoiser.inputs(1)
    layers = cost.measure(model, **inputs)
    # the counter of torch 2.7 does not see the products inside the fused attention of a CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        model(**inputs)
    assert 2 * sum(layer.macs for layer in layers) == flops.get_total_flops()
    network = QuantModel.wrap(model, Bits(4, 8))
    assert {layer.name for layer in layers if layer.kind != "matmul"} == network.layers.keys()
    products = {f"{path.removesuffix('.matmul')}.product{i}" for path in network.matmuls for i in (0, 1)}
    assert {layer.name for layer in layers if layer.kind == "matmul"} == products


def test_saved_networks_load_in_a_fresh_process_with_equal_outputs_to_the_bit(tmp_path):
    for name in DENOISERS:
        network, inputs = quantized(name)
        with torch.no_grad():
            torch.save((inputs, network(**inputs)[0]), tmp_path / f"{name}.pt")
        io.save(network, tmp_path / name)
    code = (
        "import sys, pathlib, torch; torch.set_num_threads(1)\n"
        "from edadm.quant import io\n"
        "for file in pathlib.Path(sys.argv[1]).glob('*.pt'):\n"
        "    inputs, expected = torch.load(file)\n"
        "    with torch.no_grad(): found = io.load(file.with_suffix(''))(**inputs)[0]\n"
        "    print(file.stem, torch.equal(found, expected))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], check=True, capture_output=True, text=True)
    assert sorted(done.stdout.split("\n")[:-1]) == sorted(f"{name} True" for name in DENOISERS)


@torch.no_grad()
def test_what_a_converter_patched_is_saved(tmp_path):
    model, inputs = diffusion_transformer(), DENOISERS["dit"].inputs(3)
    model.pos_embed.pos_embed.mul_(1.5)  # not part of the state that diffusers saves, as the next two
    church = church_unet()
    assert church.mid_block.attentions[0].heads == 2
    for name, patched, x in (("dit", model, inputs), ("church", church, DENOISERS["unet2d_church"].inputs(3))):
        network = QuantModel.wrap(patched, Bits(8, 32))
        set_weight_ranges(network, MinMax())
        network.set_state(weights=True, activations=True)
        loaded = io.load(io.save(network, tmp_path / name))
        assert torch.equal(loaded(**x)[0], network(**x)[0])
    assert loaded.model.mid_block.attentions[0].heads == 2
    assert loaded.model.mid_block.attentions[0].scale == 8**-0.5


def test_a_network_in_half_precision_is_not_saved(tmp_path):
    network, _ = quantized("dit")
    with pytest.raises(EdadmError, match=r"pos_embed\.proj is in torch\.float16: save the network in float32"):
        io.save(network.half(), tmp_path)


def test_real_networks_have_the_units_of_the_official_code():
    """Structures of Stable Diffusion 1.4 and LDM-4 ImageNet: residual and transformer blocks, and single layers."""
    from diffusers import UNet2DConditionModel

    imagenet = {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (192, 384, 576, 960),
        "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 3),
        "up_block_types": (*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"),
        "attention_head_dim": 1,
        "cross_attention_dim": 512,
    }
    for config, weights in (({"cross_attention_dim": 768}, 859_077_120), (imagenet, 400_586_880)):
        with torch.device("meta"):
            network = QuantModel.wrap(UNet2DConditionModel(**config), Bits(4, 8))
        assert sum(layer.weight.numel() for layer in network.layers.values()) == weights
        kinds = Counter("transformer" if unit.matmuls else unit.kind for unit in network.units("block"))
        # time MLP, conv_in, conv_out, three resamplers each way, proj_in and proj_out of every transformer
        assert kinds == {"block": 22, "transformer": 16, "layer": 2 + 2 + 6 + 32}
        assert sum(layer.split is not None for layer in network.layers.values()) == 12


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"use_linear_projection": True, "transformer_layers_per_block": 2, "attention_head_dim": 2},  # as SD 2 and XL
        {"num_class_embeds": 5},
        {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 7},
        {"time_cond_proj_dim": 6},
        {"encoder_hid_dim": 9},
        {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 29},
        {"mid_block_type": "UNetMidBlock2D"},
        {"mid_block_type": None},
        {"down_block_types": ("AttnDownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 4},
        {"resnet_time_scale_shift": "scale_shift", "only_cross_attention": True},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_variants_of_the_conditional_unet(changes):
    model = conditional_unet(**changes)
    inputs = DENOISERS["unet2d_condition"].inputs(2)
    inputs["encoder_hidden_states"] = torch.randn(2, 4, changes.get("encoder_hid_dim", 6))
    if "num_class_embeds" in changes:
        inputs["class_labels"] = torch.tensor([0, 4])
    if "class_embed_type" in changes:
        inputs["class_labels"] = torch.randn(2, 7)
    if "time_cond_proj_dim" in changes:
        inputs["timestep_cond"] = torch.randn(2, 6)
    if "addition_embed_type" in changes:
        inputs["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 5), "time_ids": torch.ones(2, 6)}
    expected = copy.deepcopy(model)(**inputs)[0]
    network, called = QuantModel.wrap(model, Bits(4, 8)), []
    units = network.units("layer")
    for unit in units:
        unit.module.register_forward_pre_hook(lambda *_, unit=unit: called.append(unit.name))
    torch.testing.assert_close(network(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
    assert called == [unit.name for unit in units]
    in_float = {path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert in_float == (
        {"class_embedding.linear_1", "class_embedding.linear_2"} if "class_embed_type" in changes else set()
    )
    listed = {site.name for site in network.sites() if site.unit == "float"}
    assert listed == {f"{path}.weight" for path in in_float}


def test_pixart_with_sizes_and_flux_without_guidance():
    from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel

    sized = PixArtTransformer2DModel(2, 6, num_layers=1, cross_attention_dim=12, use_additional_conditions=True)
    network = QuantModel.wrap(sized, Bits(4, 8))
    assert "adaln_single.emb.aspect_ratio_embedder.linear_2" in [unit.name for unit in network.units("block")]
    plain = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=1, axes_dims_rope=(4, 2, 2)
    )
    assert len(QuantModel.wrap(plain, Bits(4, 8)).units("block")) == COUNTS["flux"][3] - 2


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"dual_cross_attention": True}, r"no role for down_blocks\.1\.attentions\.0\.transformers"),
        ({"addition_embed_type": "text", "addition_embed_type_num_heads": 2}, r"no role for add_embedding\.pool"),
        ({"attention_type": "gated"}, r"no role for \S*fuser|fuser\.attn"),
        ({"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 3}, None),
        ({"down_block_types": ("KDownBlock2D", "CrossAttnDownBlock2D"), "norm_num_groups": 8}, r"no role for down_blocks\.0\.resnets\.0"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, r"mid_block\.attentions\.0 uses AttnAddedKVProcessor"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_the_conditional_unet_cannot_cover_is_named(changes, found):
    model = conditional_unet(**changes)
    if found is None:
        assert "class_embedding" not in QuantModel.wrap(model, Bits(4, 8)).layers
        return
    with pytest.raises(EdadmError, match=found):
        QuantModel.wrap(model, Bits(4, 8))


def test_a_layer_in_two_places_is_named():
    model = diffusion_transformer()
    model.transformer_blocks[1].ff.net[2] = model.transformer_blocks[0].ff.net[2]
    with pytest.raises(EdadmError, match=r"transformer_blocks\.1\.ff\.net\.2 is the same module"):
        QuantModel.wrap(model, Bits(4, 8))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
def test_weights_that_are_not_in_full_precision_are_named(dtype):
    model = diffusion_transformer()
    model.proj_out_2.weight = nn.Parameter(torch.ones(4, 2, dtype=dtype), requires_grad=False)
    with pytest.raises(EdadmError, match=rf"proj_out_2 has weights of type {dtype}"):
        QuantModel.wrap(model, Bits(4, 8))

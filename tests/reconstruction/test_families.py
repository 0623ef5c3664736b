"""What reconstruction caches of every denoiser family is what plain forward passes show."""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch

from edadm.errors import EdadmError
from edadm.quant.calibrate import set_activation_ranges, set_weight_ranges
from edadm.quant.network import Bits, QuantModel, unit_state
from edadm.quant.ranges import MinMax
from edadm.reconstruction.cache import Cache
from edadm.reconstruction.passes import Arguments, one_tensor
from edadm.reconstruction.random import seeded
from edadm.reconstruction.reconstruct import reconstruct
from edadm.reconstruction.settings import Joint
from tests.reconstruction.elsewhere import Elsewhere
from tests.toys import DENOISERS

JOINT = Joint(1, lr_weight=0.1, lr_act=1e-3, batch=2)
ROWS, PASS = 5, 3  # batches of 3 and 2 rows


@pytest.fixture(autouse=True)
def _quiet():
    """Without diffusers' warning about position numbers with a batch axis."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def run(name, granularity, **options):
    """Reconstruct a small denoiser; return it, its inputs, and the data of every unit."""
    denoiser, seen = DENOISERS[name], {}
    network, inputs = QuantModel.wrap(denoiser.build(), Bits(8, 8)), denoiser.inputs(ROWS)
    set_weight_ranges(network, MinMax())
    set_activation_ranges(network, MinMax(), [lambda: network(**inputs)])
    reconstruct(
        network,
        list(inputs.values()),
        JOINT,
        granularity,
        seeded(0),
        names=list(inputs),
        rows_per_pass=PASS,
        observe=lambda step: seen.update({step.unit.name: (step.data, len(step.losses.layers))}),
        **options,
    )
    return network, inputs, seen


@pytest.mark.parametrize("granularity", ["fbr", "layer"])
@pytest.mark.parametrize("name", DENOISERS)
def test_inputs_and_targets_are_those_of_a_plain_pass(name, granularity):
    network, inputs, seen = run(name, granularity)
    units = network.units("layer" if granularity == "layer" else "block")
    caught, layers = {}, {}

    def note_unit(unit, module, positional, named, output):
        call = Arguments(positional, named, network.family.shared_arguments)
        caught.setdefault(unit.name, (call.tensors, one_tensor(output, unit.name)))

    for unit in units:
        unit.module.register_forward_hook(partial(note_unit, unit), with_kwargs=True)
    for path, layer in network.layers.items():
        layer.register_forward_hook(lambda layer, _, output, path=path: layers.setdefault(path, output))
    network.set_state(weights=False, activations=False)
    with torch.no_grad():
        network(**inputs)

    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5)
    assert list(seen) == [unit.name for unit in units]
    for unit in units:
        data, losses = seen[unit.name]
        (main, *companions), output = caught[unit.name]
        close(data.full, main)
        close(data.target, output)
        assert [part.shape for part in data.companions] == [part.shape for part in companions]
        expected = unit.layers if unit.kind == "block" and granularity == "fbr" else ()
        tapped = [layer.name for layer in expected if layer.name != unit.last]
        assert losses == len(tapped) == len(data.layer_targets)
        for path, target in zip(tapped, data.layer_targets, strict=True):
            close(target, layers[path])


@pytest.mark.parametrize("name", DENOISERS)
def test_what_waits_elsewhere_gives_the_same_bits(name, tmp_path):
    one, _, seen = run(name, "fbr")
    for cache in (Cache("disk", tmp_path / "cache"), Elsewhere()):
        other, _, moved = run(name, "fbr", cache=cache)
        for unit, (data, _) in seen.items():
            for found, expected in zip(moved[unit][0].layer_targets, data.layer_targets, strict=True):
                assert torch.equal(found, expected), (cache, unit)
        for first, second in zip(one.units("block"), other.units("block"), strict=True):
            expected, found = unit_state(first), unit_state(second)
            assert expected.keys() == found.keys()
            assert all(torch.equal(expected[key], found[key]) for key in expected), (cache, first.name)


def test_joint_blocks_are_optimised_on_both_streams():
    _, _, seen = run("sd3", "block")
    first, last = (seen[f"transformer_blocks.{i}"][0] for i in (0, 1))
    assert first.full.shape == last.full.shape == (ROWS, 16, 8)
    assert [part.shape for part in first.companions] == [(ROWS, 4, 8), (ROWS, 8)]
    assert first.target.shape == (ROWS, 16 + 4, 8) and last.target.shape == (ROWS, 16, 8)


def test_what_all_rows_share_is_passed_on_whole():
    network, _, seen = run("flux", "block")
    data = seen["single_transformer_blocks.0"][0]
    assert [part.shape for part in data.companions] == [(ROWS, 4, 8), (ROWS, 8)]
    assert [part.shape for part in data.call.named["image_rotary_emb"]] == [(10, 8), (10, 8)]
    assert network.family.shared_arguments == ("image_rotary_emb",)


def test_a_mask_belongs_to_the_rows():
    _, inputs, seen = run("pixart", "block")
    data = seen["transformer_blocks.1"][0]
    mask = next(part for part in data.companions if part.shape == (ROWS, 1, 4))
    assert torch.equal(mask[:, 0] == 0, inputs["encoder_attention_mask"] == 1)


def test_rows_of_another_number_are_named():
    network, inputs = QuantModel.wrap(DENOISERS["unet2d_condition"].build(), Bits(8, 32)), torch.randn(3, 3, 8, 8)
    set_weight_ranges(network, MinMax())
    context = torch.randn(1, 4, 6)

    def forward(model, positional, named):
        return positional, named | {"encoder_hidden_states": context}

    network.model.register_forward_pre_hook(forward, with_kwargs=True)
    with pytest.raises(
        EdadmError, match=r"unit \S+transformer_blocks\.0 gets tensors of shapes \(3, 16, 16\), \(1, 4, 6\)"
    ):
        reconstruct(network, (inputs, torch.ones(3)), JOINT, "block", seeded(0))


def test_a_unit_that_sees_height_and_width_apart_is_reconstructed():
    from diffusers import PixArtTransformer2DModel

    sized = PixArtTransformer2DModel(
        2, 6, num_layers=1, cross_attention_dim=12, in_channels=2, out_channels=4, sample_size=8, caption_channels=5,
        use_additional_conditions=True,
    )  # fmt: skip
    whole = sized.forward

    def forward(x, timestep, encoder_hidden_states, resolution, aspect_ratio):
        added = {"resolution": resolution, "aspect_ratio": aspect_ratio}
        named = {"encoder_hidden_states": encoder_hidden_states, "added_cond_kwargs": added}
        return whole(x, timestep=timestep, return_dict=False, **named)

    sized.forward = forward
    network, seen = QuantModel.wrap(sized, Bits(8, 8)), {}
    shapes = ((2, 8, 8), (), (3, 5), (2,), (1,))
    rows = [torch.rand(ROWS, *shape) for shape in shapes]
    set_weight_ranges(network, MinMax())
    set_activation_ranges(network, MinMax(), [lambda: network(*rows)])
    observe = lambda step: seen.update({step.unit.name: len(step.data.target)})
    reconstruct(network, rows, JOINT, "fbr", seeded(0), rows_per_pass=PASS, observe=observe)
    assert seen["adaln_single.emb.resolution_embedder.linear_1"] == 2 * ROWS
    assert set(seen.values()) == {ROWS, 2 * ROWS}

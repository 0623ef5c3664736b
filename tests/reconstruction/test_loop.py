from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from edadm.errors import Diverged, EdadmError
from edadm.quant.network import Bits, unit_state
from edadm.reconstruction.loop import reconstruct_unit
from edadm.reconstruction.objective import LayerTap, UnitData, loss_layers
from edadm.reconstruction.passes import Arguments
from edadm.reconstruction.random import RandomSource
from edadm.reconstruction.settings import Joint, TwoPhase

JOINT = Joint(30, lr_weight=0.05, lr_act=1e-3, batch=8, layer_loss_weight=0.8)
ROWS = 16


@pytest.fixture
def make_unit(make_network):
    """Build a resnet unit with a split shortcut and its data for a phase."""

    def make(phase, bits=Bits(4, 8)):  # noqa: B008
        network = make_network(bits)
        unit = next(u for u in network.units("block") if any(layer.split for layer in u.layers))
        generator = torch.Generator().manual_seed(1)
        channels, companions = unit.layers[0].weight.shape[1], unit.layers[1].weight.shape[1]
        full = torch.randn(ROWS, channels, 4, 4, generator=generator)
        quantized = full + 0.05 * torch.randn(full.shape, generator=generator)
        temb = torch.randn(ROWS, companions, generator=generator)
        network.set_state(weights=False, activations=False)
        with torch.no_grad(), LayerTap(loss_layers(unit, phase.excluded_layer)) as tap:
            target = unit.module(full, temb)
        layer_targets = tap.take() if phase.layer_loss_weight else ()
        call = Arguments((full, temb), {}).template()
        return unit, UnitData(call, full, quantized, (temb,), target, layer_targets)

    return make


def run(make_unit, phase, seed=0, **options):
    unit, data = make_unit(phase)
    return unit, reconstruct_unit(unit, data, phase, RandomSource(seed), **options)


@pytest.mark.parametrize("phase", [*JOINT.phases(), *TwoPhase(30, 30, lr_weight=0.05, lr_act=1e-3, batch=8).phases()])
def test_reconstruction_lowers_the_loss_and_leaves_a_plain_unit(make_unit, phase):
    if phase.lr_act:
        phase = replace(phase, lr_act=1e-2)
    unit, report = run(make_unit, phase)
    assert report.loss_after < report.loss_before
    assert (report.unit, report.phase, report.iterations) == (unit.name, phase.name, 30)
    assert (report.undecided is None) == (phase.lr_weight is None)
    assert all(layer.alphas is None for layer in unit.layers)
    for quantizer in unit.activation_quantizers:
        assert quantizer.drop is None and not quantizer.training_grad
        assert not quantizer.scale.requires_grad and quantizer.scale.grad is None


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(make_unit):
    phase = JOINT.phases()[0]
    states = [unit_state(run(make_unit, phase, seed)[0]) for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_without_dropping_a_second_pass_gives_what_the_first_gives(make_unit):
    curves = []
    for layer_loss_pass in ("separate", "shared"):
        phase = replace(JOINT, layer_loss_pass=layer_loss_pass, drop_prob=0.0).phases()[0]
        curve: list[float] = []
        run(make_unit, phase, observe=lambda step, curve=curve: curve.append(step.losses.total.item()))
        curves.append(curve)
    assert curves[0] == curves[1]


def test_the_second_pass_draws_masks_of_its_own_up_to_the_last_layer_it_needs(make_unit):
    drawn: list[tuple[str, int]] = []

    class Watched(RandomSource):
        def mask(self, iteration, site, pass_index, *rest):
            drawn.append((site.rsplit(".", 2)[-2] + site[-2:] if "." in site else site, pass_index))
            return super().mask(iteration, site, pass_index, *rest)

    phase = replace(JOINT.phases()[0], iterations=1)
    unit, data = make_unit(phase)
    reconstruct_unit(unit, data, phase, Watched(0))
    assert drawn == [
        ("input_mix", 0),
        ("conv1er", 0),
        ("time_emb_projer", 0),
        ("conv2er", 0),
        ("conv_shortcuter", 0),
        ("conv_shortcut_0", 0),
        ("conv1er", 1),
        ("time_emb_projer", 1),
        ("conv2er", 1),
    ]


def test_layer_losses_are_weighted_and_the_regulariser_waits_for_its_warm_up(make_unit):
    seen = []
    phase = replace(JOINT.phases()[0], iterations=10, reg_weight=0.01, warmup=0.5, layer_loss_weight=0.3)
    run(make_unit, phase, observe=lambda step: seen.append(step.losses))
    assert [losses.rounding is None for losses in seen] == [True] * 4 + [False] * 6
    for losses in seen:
        expected = losses.unit + 0.3 * sum(losses.layers) + (losses.rounding if losses.rounding is not None else 0)
        assert torch.allclose(losses.total, expected)
        assert len(losses.layers) == 3


def test_scales_stay_positive(make_unit):
    unit, _ = run(make_unit, replace(JOINT.phases()[0], lr_act=5.0))
    assert all(quantizer.scale >= 1e-8 for quantizer in unit.activation_quantizers)


def test_a_loss_that_is_not_a_number_names_unit_and_iteration(make_unit):
    phase = JOINT.phases()[0]
    unit, data = make_unit(phase)

    def poison(step):
        if step.iteration == 4:
            unit.layers[0].alphas[0].grad.fill_(float("nan"))

    with pytest.raises(Diverged, match=rf"loss of unit {unit.name} is nan at iteration 6 of phase joint"):
        reconstruct_unit(unit, data, phase, RandomSource(0), observe=poison)
    assert all(layer.alphas is None for layer in unit.layers)
    assert all(quantizer.drop is None for quantizer in unit.activation_quantizers)


def test_a_batch_larger_than_the_rows_is_an_error(make_unit):
    with pytest.raises(EdadmError, match=f"batch of {ROWS + 1} rows asked for, but there are {ROWS}"):
        run(make_unit, replace(JOINT.phases()[0], batch=ROWS + 1))


@pytest.mark.parametrize("bits", [Bits(4, 32), Bits(32, 8), Bits(32, 32)])
def test_floating_point_parts_are_not_trained(make_unit, bits):
    phase = JOINT.phases()[0]
    unit, data = make_unit(phase, bits)
    report = reconstruct_unit(unit, data, phase, RandomSource(0))
    assert report.iterations == (0 if bits == Bits(32, 32) else 30)
    assert (report.undecided is None) == (bits.weight == 32)


def test_values_on_a_bound_pass_the_gradient_where_the_phase_says_so(make_unit):
    ends = []
    for edges in (False, True):
        (phase,) = replace(JOINT, edges=edges, lr_act=1e-2).phases()
        unit, _ = run(make_unit, phase)
        ends.append(unit_state(unit))
    assert any(not torch.equal(ends[0][key], ends[1][key]) for key in ends[0])

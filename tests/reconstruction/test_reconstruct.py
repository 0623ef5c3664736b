from __future__ import annotations

from functools import partial
from weakref import ref

import pytest
import torch

from edadm.errors import EdadmError
from edadm.quant.calibrate import set_activation_ranges
from edadm.quant.network import Bits, load_unit_state
from edadm.quant.ranges import MSE
from edadm.reconstruction import reconstruct as reconstruction
from edadm.reconstruction.cache import Cache
from edadm.reconstruction.parking import held_tensors
from edadm.reconstruction.passes import PausedPasses
from edadm.reconstruction.random import seeded
from edadm.reconstruction.reconstruct import RANGES, reconstruct
from edadm.reconstruction.settings import Joint, TwoPhase
from tests.reconstruction.conftest import build_network

JOINT = Joint(3, lr_weight=0.1, lr_act=1e-3, batch=4)
TWO_PHASE = TwoPhase(3, 3, lr_weight=0.1, batch=4)
PASS = 5  # does not divide the rows


def run(network, rows, settings, granularity="fbr", **options):
    """Reconstruct with ranges set behind the first phase where there are two; return what on_unit received."""
    kept = {}
    if isinstance(settings, TwoPhase):
        options["set_activation_ranges"] = partial(set_activation_ranges, network, MSE(), [lambda: network(*rows)])
    options = {"on_unit": lambda key, state, report: kept.update({key: (state, report)})} | options
    reports = reconstruct(network, rows, settings, granularity, seeded(0), rows_per_pass=PASS, **options)
    return kept, reports


def state(network):
    """Everything that reconstruction may change."""
    weights = {name: layer.quantized_weight() for name, layer in network.layers.items()}
    return weights | {q.name: torch.stack([q.scale, q.zero_point]) for q in network.activation_quantizers}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("settings", [JOINT, TWO_PHASE])
@pytest.mark.parametrize("granularity", ["layer", "block", "fbr"])
def test_every_granularity_combines_with_every_optimisation(make_network, rows, settings, granularity):
    network = make_network(ranges=settings is JOINT)
    seen = set()
    kept, reports = run(network, rows, settings, granularity, observe=lambda step: seen.add(len(step.losses.layers)))
    units = network.units("layer" if granularity == "layer" else "block")
    phases = [phase.name for phase in settings.phases()]
    assert [(r.phase, r.unit) for r in reports] == [(phase, unit.name) for phase in phases for unit in units]
    assert [key for key in kept if key != RANGES] == [f"{r.phase}.{r.unit}" for r in reports]
    assert (RANGES in kept) == (settings is TWO_PHASE)
    assert (max(seen) > 0) == (granularity == "fbr")
    with torch.no_grad():
        assert torch.isfinite(network(*rows).sample).all()


@pytest.mark.parametrize("settings", [JOINT, TWO_PHASE])
def test_resuming_at_any_unit_gives_the_same_bits(make_network, rows, settings):
    network = make_network(ranges=settings is JOINT)
    kept, _ = run(network, rows, settings, limit=6)
    expected = state(network)
    keys = list(kept)
    for stop in range(0, len(keys) + 1, 2):
        resumed = make_network(ranges=settings is JOINT)
        done = {key: kept[key][0] for key in keys[:stop]}
        again, _ = run(resumed, rows, settings, limit=6, done=done)
        assert list(again) == keys[stop:]
        assert_equal(state(resumed), expected)


@pytest.mark.parametrize("settings", [JOINT, TWO_PHASE])
def test_the_place_of_the_cache_changes_no_bit(make_network, rows, settings, tmp_path):
    expected = make_network(ranges=settings is JOINT)
    _, reports = run(expected, rows, settings, limit=9)
    for place in ("host", "disk"):
        network = make_network(ranges=settings is JOINT)
        _, found = run(network, rows, settings, limit=9, cache=Cache(place, tmp_path / place))
        assert_equal(state(network), state(expected))
        assert [(r.loss_before, r.loss_after) for r in found] == [(r.loss_before, r.loss_after) for r in reports]
        assert not (tmp_path / place).exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_waiting_passes_of_a_gpu_hold_what_plain_passes_hold(make_network, rows, tmp_path, place):
    network, seen = make_network().cuda(), []
    run(network, rows, JOINT, limit=9, cache=Cache(place, tmp_path / "cache"), observe=lambda step: seen.append(step))
    step = next(step for step in seen if step.unit.name == "down_blocks.1.attentions.0")
    data = [step.data.full, step.data.quantized, *step.data.companions, step.data.target, *step.data.layer_targets]
    assert {tensor.device.type for tensor in data} == {"cuda" if place == "device" else "cpu"}
    caught = []
    step.unit.module.register_forward_hook(lambda module, inputs, output: caught.append((inputs[0], output)))
    network.set_state(weights=False, activations=False)
    with torch.no_grad():
        network(*(part.cuda() for part in rows))
    for found, expected in zip((step.data.full, step.data.target), caught[0], strict=True):
        torch.testing.assert_close(found.cuda(), expected, rtol=1e-3, atol=1e-4)


def test_a_cache_on_disk_holds_everything_that_waits_in_files(make_network, rows, tmp_path, monkeypatch):
    class Seen(PausedPasses):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            both.append(self)

    def look(step):
        data = step.data
        cached = [data.full, data.quantized, *data.companions, data.target, *data.layer_targets]
        assert all(tensor.untyped_storage().filename for tensor in cached)
        waiting = [tensor for passes in both for one in passes._passes for tensor in held_tensors(one, one.rows)]
        fixed = {part.untyped_storage().data_ptr() for part in rows}
        own = [tensor.untyped_storage() for tensor in waiting if tensor.untyped_storage().data_ptr() not in fixed]
        seen.append(len(own))
        assert all(storage.filename for storage in own)

    seen, both = [], []
    monkeypatch.setattr(reconstruction, "PausedPasses", Seen)
    run(make_network(), rows, JOINT, limit=7, cache=Cache("disk", tmp_path / "cache"), observe=look)
    assert max(seen) >= 2 * 3 * 4  # both paths, three batches, the open skip connections


def test_the_data_of_one_unit_are_alive_at_a_time(make_network, rows, monkeypatch):
    alive, stack = [], Cache.stack
    targets = {}

    def stacked(self, *arguments):
        alive.append(sum(target() is not None for target in targets.values()))
        return stack(self, *arguments)

    monkeypatch.setattr(Cache, "stack", stacked)
    run(
        make_network(),
        rows,
        JOINT,
        limit=6,
        observe=lambda step: targets.update({step.unit.name: ref(step.data.target)}),
    )
    assert len(targets) == 6 and alive == [0] * 12


def test_quantized_weights_of_finished_units_are_not_kept(make_network, rows):
    network = make_network()
    kept = []

    def look(step):
        kept.append([name for name, layer in network.layers.items() if layer._dequantized is not None])

    run(network, rows, JOINT, limit=6, observe=look)
    assert not any(kept)  # nor of the one under way, whose rounding is soft


def test_states_after_a_gap_are_computed_again(make_network, rows):
    network = make_network()
    kept, _ = run(network, rows, JOINT, limit=4)
    done = {key: kept[key][0] for key in kept}
    missing = list(kept)[1]
    del done[missing]
    again, _ = run(make_network(), rows, JOINT, limit=4, done=done)
    assert list(again) == list(kept)[1:]


def test_the_network_before_a_unit_is_computed_once_per_path(make_network, rows):
    network, calls = make_network(), []
    first = network.layers["conv_in"]

    def count(layer, inputs, output):
        if not layer.alphas and len(inputs[0]) != JOINT.batch:
            calls.append((layer.weight_enabled, len(output)))

    first.register_forward_hook(count)
    run(network, rows, JOINT, limit=8)
    sizes = [len(part) for part in rows[0].split(PASS)]
    evaluations = 2 * [(True, len(rows[0]))]  # the loss of conv_in itself, before and after
    assert sorted(calls) == sorted([(False, n) for n in sizes] + [(True, n) for n in sizes] + evaluations)


def test_inputs_and_targets_are_those_of_plain_passes(make_network, rows):
    seen = {}
    kept, _ = run(make_network(), rows, JOINT, limit=6, observe=lambda step: seen.update({step.unit.name: step.data}))
    network = make_network()
    *earlier, unit = network.units("block")[:6]
    data = seen[unit.name]
    for done, (unit_state, _) in zip(earlier, kept.values(), strict=False):
        load_unit_state(done, unit_state)

    caught = {}
    unit.module.register_forward_hook(lambda module, inputs, output: caught.update(main=inputs[0], output=output))
    with torch.no_grad():
        network.set_state(weights=False, activations=False)
        network(*rows)
        assert torch.allclose(data.full, caught["main"], atol=1e-5)
        assert torch.allclose(data.target, caught["output"], atol=1e-5)
        network.set_state(weights=True, activations=True)
        network(*rows)
    # A few codes at a rounding tie may flip, since rows go through the network in batches of another size.
    assert ((data.quantized - caught["main"]).abs() > 1e-4).float().mean() < 0.05


def test_progress_counts_every_iteration_of_a_phase(make_network, rows):
    told = []
    run(make_network(), rows, JOINT, limit=3, progress=lambda *numbers: told.append(numbers))
    assert told == [("reconstruction, joint", done, 9) for done in (3, 6, 9)]


def test_the_whole_network_is_on_at_the_end_and_gradients_are_as_before(make_network, rows):
    network = make_network()
    run(network, rows, JOINT, limit=1)
    assert all(layer.weight_enabled for layer in network.layers.values())
    assert all(quantizer.enabled for quantizer in network.activation_quantizers)
    assert torch.is_grad_enabled()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_hooks_and_training_end_when_a_caller_fails(make_network, rows):
    network = make_network()

    def fail(key, state, report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(network, rows, JOINT, on_unit=fail)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_float_activations_need_no_ranges(make_network, rows):
    _, reports = run(make_network(Bits(4, 32), ranges=False), rows, JOINT, limit=3)
    assert all(report.iterations == 3 for report in reports)


def storages(network):
    return {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values() if tensor.numel()}


@pytest.mark.parametrize("ranges", [True, False])
def test_a_network_of_these_tests_is_one_that_is_built_anew(make_network, rows, ranges):
    other = make_network(ranges=ranges)
    copied, built = make_network(ranges=ranges), build_network(Bits(4, 8), ranges)
    assert not storages(copied) & storages(other)
    assert_equal(state(copied), state(built))
    assert [str(site) for site in copied.sites()] == [str(site) for site in built.sites()]
    for network in (copied, built):
        network.set_state(weights=True, activations=ranges)
    assert torch.equal(copied(*rows)[0], built(*rows)[0])


def test_bad_input_is_named(make_network, rows):
    with pytest.raises(ValueError, match="granularity is 'row': choose one of layer, block, fbr"):
        run(make_network(), rows, JOINT, "row")
    with pytest.raises(EdadmError, match=r"different lengths: \[3, 12\]"):
        run(make_network(), (rows[0], rows[1][:3]), JOINT)
    with pytest.raises(EdadmError, match="activation ranges are not set"):
        run(make_network(ranges=False), rows, JOINT)

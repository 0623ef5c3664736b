"""Whole network: sites, bits, splits, ranges, teacher-forced layers and execution order (golden README 11, 9.9)."""

from __future__ import annotations

import copy
import json
import re
from functools import partial

import pytest
import torch

from edadm.quant.calibrate import set_activation_ranges, set_weight_ranges
from edadm.quant.network import Bits, QuantModel, SitePlan
from edadm.quant.ranges import MSE
from tests.golden.cases import load
from tests.golden.official import block_module, quantizers_of

RELEASED_EDGE = {"time_mlp_1": {"weight": 8}, "output": {"weight": 8, "act": 32}}


@pytest.fixture(scope="module")
def case(golden):
    return load(golden / "eda_ddim" / "10_network")


@pytest.fixture
def networks(case, golden_unet, mapping_case, official_names):
    """One wrapped network per stored variant; the tag W<weight>A<act>S<softmax> gives the nominal bits."""
    slip = f"up.{len(mapping_case['network']['ch_mult']) - 1}.upsample.conv.act_quantizer"
    result = {}
    for tag in case[0]["variants"]:
        widths = re.fullmatch(r"W(\d+)A(\d+)(?:S(\d+))?", tag).groups()
        bits = Bits(*(int(width) for width in widths if width is not None))
        network = QuantModel.wrap(copy.deepcopy(golden_unet), bits, SitePlan(RELEASED_EDGE))
        # Below A8 the official code gives 8 bits to a quantizer that it does not mean (golden README 11.2); we do not.
        if slip.removesuffix(".act_quantizer") in official_names:
            quantizers_of(network, official_names)[slip].bits = 8
        result[tag] = network
    return result


def test_sites_bits_and_splits_equal_official(case, networks, official_names):
    for tag, network in networks.items():
        variant = case[0]["variants"][tag]
        ours = quantizers_of(network, official_names)
        disabled = {f"{name}.act_quantizer" for name in variant["disabled_input_quantizers"]}
        for name, facts in variant["quantizers"].items():
            if name not in disabled:
                assert ours[name].bits == facts["bits"], (tag, name)
        in_use = {name for name, q in ours.items() if q.bits < 16}
        assert in_use == set(variant["quantizers"]) - disabled
        splits = {name: network.layers[official_names[name]].split for name in variant["splits"]}
        assert splits == variant["splits"]


def test_ranges_and_outputs_equal_official(case, networks, official_names):
    settings, tensors, tolerance = case[0], case[1], case[0]["tolerance"]
    batch = settings["calibration"]["act_batch"]
    for tag, network in networks.items():
        variant, ours = settings["variants"][tag], quantizers_of(network, official_names)
        with torch.no_grad():
            unquantized = network(tensors["x"], tensors["t"]).sample
        assert ((unquantized - tensors["eps_fp"]).abs() <= tolerance["eps_fp_max_abs"]).all()
        set_weight_ranges(network, MSE())
        for name, facts in variant["quantizers"].items():
            if facts["kind"] == "weight":
                expected = tensors[f"{tag}.q.{name}.delta"]
                assert ((ours[name].scale - expected).abs() <= tolerance["weight_delta_rel"] * expected).all(), name
                assert torch.equal(ours[name].zero_point, tensors[f"{tag}.q.{name}.zero_point"]), name
        network.set_state(weights=True, activations=False)
        with torch.no_grad():
            weight_only = network(tensors["x"], tensors["t"]).sample
        error = (weight_only - tensors[f"{tag}.eps_weight_only"]).abs().max()
        assert error <= tolerance["eps_weight_only_max_abs"]

        rows = zip(tensors["calib_x"].split(batch), tensors["calib_t"].split(batch))
        set_activation_ranges(network, MSE(), [partial(network, x, t) for x, t in rows])
        deltas = torch.tensor(
            [
                abs(float(ours[name].scale) / float(tensors[f"{tag}.q.{name}.delta"]) - 1)
                for name, facts in variant["quantizers"].items()
                if facts["kind"] == "activation" and ours[name].bits < 16
            ]
        )
        assert deltas.median() <= 0.02 and deltas.max() <= 0.25

        with torch.no_grad():
            eps = network(tensors["x"], tensors["t"]).sample
        assert _rms(eps - tensors[f"{tag}.eps"]) <= 2 * max(variant["perturb_1e_6"]["rms"])
        assert abs(_rms(eps - tensors["eps_fp"]) / variant["quantization_rms"] - 1) <= 0.25


def test_teacher_forced_layers_equal_official(case, networks, official_names):
    settings, tensors = case
    for tag, network in networks.items():
        variant, ours = settings["variants"][tag], quantizers_of(network, official_names)
        for name, quantizer in ours.items():
            if quantizer.bits < 16:
                quantizer.set(tensors[f"{tag}.q.{name}.delta"], tensors[f"{tag}.q.{name}.zero_point"])
        network.set_state(weights=True, activations=True)
        for entry in variant["teacher_forced"]:
            layer = network.layers[official_names[entry["layer"]]]
            x = tensors[f"{tag}.layer.{entry['layer']}.in"]
            as_tokens = layer.weight.ndim == 2 and x.ndim == 4
            with torch.no_grad():
                out = layer(x.flatten(2).transpose(1, 2) if as_tokens else x)
            out = (out.transpose(1, 2) if as_tokens else out).flatten()[:: entry["out_stride"]]
            expected = tensors[f"{tag}.layer.{entry['layer']}.out"]
            error = (out - expected).abs() / expected.abs().max()
            close = error <= settings["tolerance"]["teacher_forced_max_abs_rel_to_max"]
            assert (~close).float().mean() <= 1e-3  # NaN is not close


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_units_follow_the_official_order(granularity, golden, networks, official_names):
    path = golden / "eda_ddim" / "10_network" / "reconstruction_order.json"
    if not path.exists():
        pytest.skip("optional file reconstruction_order.json is absent")
    order = json.loads(path.read_text())
    order = order.get(granularity, order)
    if "raises" in order:  # nothing to compare with: the test below still holds
        return
    units = next(iter(networks.values())).units(granularity)
    assert [(unit.kind, unit.name) for unit in units] == [
        _our_unit(kind, official, official_names) for kind, official in _in_execution_order(order)
    ]


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_units_visit_every_layer_once_as_it_is_executed(granularity, case, networks):
    network, executed = next(iter(networks.values())), []
    for name, layer in network.layers.items():
        layer.register_forward_hook(lambda *_, name=name: executed.append(name))
    with torch.no_grad():
        network(case[1]["x"][:1], case[1]["t"][:1])
    units = network.units(granularity)
    unit_of = {layer.name: unit.name for unit in units for layer in unit.layers}
    covered = [layer.name for unit in units for layer in unit.layers]
    assert sorted(covered) == sorted(executed) == sorted(network.layers)
    assert [unit.name for unit in units if unit.layers] == list(dict.fromkeys(unit_of[name] for name in executed))


def _in_execution_order(order):
    """Return the official units with every attention of a level behind its resnet block (golden README 9.9)."""
    levels: dict[str, int] = {}

    def place(numbered):
        position, (_, name) = numbered
        level = re.match(r"(?:down|up)\.\d+", name)
        if level is None:
            return position, 0, 0
        block = re.match(r"\.(block|attn)\.(\d+)", name[level.end() :])
        inside = (int(block[2]), block[1] == "attn") if block else (len(order), 0)
        return levels.setdefault(level[0], position), *inside

    return [unit for _, unit in sorted(enumerate(order), key=place)]


def _our_unit(kind, official, official_names):
    name = block_module(official, official_names)
    return ("matmul", f"{name}.matmul") if kind == "attention_matmul_quantizers" else (kind, name)


def _rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt())

"""Joint reconstruction of single units, minibatches and masks replayed (golden README 9)."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from edadm.quant.network import Bits, QuantModel, SitePlan
from edadm.reconstruction.loop import reconstruct_unit
from edadm.reconstruction.objective import LayerTap, UnitData, loss_layers
from edadm.reconstruction.passes import Arguments
from edadm.reconstruction.settings import Joint
from tests.conftest import golden_root
from tests.golden.cases import load
from tests.golden.official import block_module, quantizers_of
from tests.golden.replay import (
    FIRST_LOSS,
    Recorder,
    Replay,
    assert_course_equals,
    curve_error,
    flipped_ties,
    relative_to_max,
    self_noise,
    sites_to_flip,
)

RUNS = sorted(file.parent.name for file in (golden_root() / "eda_ddim" / "08_recon").glob("*/case.json")) or ["any"]


@pytest.mark.parametrize("run", RUNS)
def test_run_equals_official(run, golden, golden_unet, official_names):
    case, tensors = load(golden / "eda_ddim" / "08_recon" / run)
    cache_file = golden / "eda_ddim" / case["cache_file"]
    settings = _settings(case)

    activations = [name for name, facts in case["quantizers"].items() if facts["kind"] == "activation"]

    def attempt(settings, flipped):
        unit, quantizers = _prepare(case, tensors, copy.deepcopy(golden_unet), official_names)
        phase = settings.phases(unit.kind)[0]
        data = _data(unit, phase, cache_file)
        replay = Replay(tensors, case["mask_shapes"], {q.name: name for name, q in quantizers.items()})
        recorder = Recorder(quantizers)
        with flipped_ties([quantizers[name] for name in flipped], replay):
            reconstruct_unit(unit, data, phase, replay, observe=recorder)
        return unit, data, recorder

    def first_error(flipped):
        losses = attempt(replace(settings, iterations=1), flipped)[2].losses["total"]
        return curve_error(losses, tensors["loss.total"][:1]).item()

    flipped = sites_to_flip(first_error, activations, FIRST_LOSS)
    unit, data, recorder = attempt(settings, flipped)
    layers = [_official(layer.name, case["block"], official_names) for layer in loss_layers(unit, "registration")]
    assert layers == case["layers_in_layer_loss"]
    assert_course_equals(case, tensors, recorder)
    with torch.no_grad():
        output = unit.module(data.quantized[:2], *(c[:2] for c in data.companions))
    stored = tensors["final_out_first2"]
    limit = max(0.01, 3 * self_noise(case)["final_out_rms_rel"])
    assert (output - stored).square().mean().sqrt() / stored.std() <= limit


def _prepare(case, tensors, unet, official_names):
    """The unit under test with the official start quantizers."""
    bits = Bits(case["weight_bits"], case["act_bits"], case["softmax_bits"])
    network = QuantModel.wrap(unet, bits, SitePlan())
    quantizers = quantizers_of(network, official_names, case["block"])
    for name, facts in case["quantizers"].items():
        assert quantizers[name].bits == facts["bits"], name
        quantizers[name].set(tensors[f"init.{name}.delta"], tensors[f"init.{name}.zero_point"])
    assert len(quantizers) == len(case["quantizers"])
    module = block_module(case["block"], official_names)
    unit = next(unit for unit in network.units("block") if unit.name == module)
    assert unit.kind == case["kind"]
    return unit, quantizers


def _settings(case) -> Joint:
    given = case["settings"]
    return Joint(
        given["iters"],
        lr_weight=given["lr_w"],
        lr_act=given["lr_a"],
        batch=given["batch_size"],
        layer_loss_weight=given["add_loss"],
        layer_loss_pass="separate",
        excluded_layer="registration",
        input_prob=given["input_prob"],
        drop_prob=1 - case["act_prob"],
        p=given["p"],
    )


def _data(unit, phase, cache_file) -> UnitData:
    _, cache = load(cache_file.parent)
    cache = {name.removeprefix("cache."): value for name, value in cache.items() if name.startswith("cache.")}
    companions = ["temb"] if "temb_inp" in cache else []
    with LayerTap(loss_layers(unit, phase.excluded_layer) if phase.layer_loss_weight else ()) as tap, torch.no_grad():
        output = unit.module(cache["sym"], *(cache[f"{name}_sym"] for name in companions))
    assert relative_to_max(output, cache["out"]) <= 2e-5
    return UnitData(
        call=Arguments((cache["inp"], *(cache[f"{name}_inp"] for name in companions)), {}).template(),
        full=cache["sym"],
        quantized=cache["inp"],
        companions=tuple(cache[f"{name}_inp"] for name in companions),
        target=cache["out"],
        layer_targets=tap.take(),
    )


def _official(name, block, official_names):
    official = next(o for o, ours in official_names.items() if ours == name)
    return official.removeprefix(f"{block}.")

"""The first units of the official order, each cached behind the reconstructed ones before it (golden README 9.13)."""

from __future__ import annotations

import re

import torch

from edadm.quant.network import Bits, QuantModel, SitePlan
from edadm.reconstruction.reconstruct import reconstruct
from edadm.reconstruction.settings import Joint
from tests.golden.cases import load
from tests.golden.official import block_module, quantizers_of
from tests.golden.replay import Recorder, Replay, curve_error, relative_to_max, sampled
from tests.golden.test_10_network import RELEASED_EDGE


def test_hand_over_between_units_equals_official(golden, golden_unet, official_names):
    folder = golden / "eda_ddim" / "12_pipeline"
    case, tensors = load(folder)
    network, x, t = _start(case, golden, golden_unet, official_names)
    blocks = {block_module(u["block"], official_names): u for u in case["units"]}
    recorders = {
        name: Recorder(quantizers_of(network, official_names, facts["block"])) for name, facts in blocks.items()
    }

    def replay(phase, unit):
        number, quantizers = list(blocks).index(unit), recorders[unit].quantizers
        names = {q.name: name for name, q in quantizers.items()}
        return Replay(tensors, blocks[unit]["mask_shapes"], names, f"u{number}.")

    def observe(step):
        recorders[step.unit.name](step)

    reports = reconstruct(
        network, (x, t), _settings(case), "fbr", replay, observe=observe, limit=len(blocks), rows_per_pass=len(x)
    )

    assert [report.unit for report in reports] == list(blocks)
    for number, (facts, recorder) in enumerate(zip(blocks.values(), recorders.values(), strict=True)):
        _compare_cache(case, facts, tensors, f"u{number}.cache.", recorder.data)
        _compare_course(facts, tensors, f"u{number}.", recorder)
    last = next(unit for unit in network.units("block") if unit.name == reports[-1].unit)
    rows = case["rows_stored"]
    with torch.no_grad():
        output = last.module(recorder.data.quantized[:rows], *(c[:rows] for c in recorder.data.companions))
    stored = tensors["final_prefix_output"]
    limit = case["tolerance"]["final_prefix_output_rms_rel_to_std"]
    assert (output - stored).square().mean().sqrt() / stored.std() <= limit


def _start(case, golden, unet, official_names):
    """The network with the official start quantizers, and the calibration rows."""
    variant = re.search(r"W(\d+)A(\d+)", case["initial_quantizers"])
    _, tensors = load(golden / "eda_ddim" / "10_network")
    network = QuantModel.wrap(unet, Bits(*map(int, variant.groups())), SitePlan(RELEASED_EDGE))
    for name, quantizer in quantizers_of(network, official_names).items():
        if quantizer.bits < 16:
            prefix = f"{variant.group()}.q.{name}"
            quantizer.set(tensors[f"{prefix}.delta"], tensors[f"{prefix}.zero_point"])
    for layer in network.layers.values():
        layer.invalidate()
    first, last = map(int, re.search(r"rows (\d+)\.\.(\d+)", case["calibration"]).groups())
    return network, tensors["calib_x"][first : last + 1], tensors["calib_t"][first : last + 1]


def _settings(case) -> Joint:
    given = case["settings"]
    return Joint(
        given["iters"],
        lr_weight=given["lr_w"],
        lr_act=given["lr_a"],
        batch=given["batch_size"],
        layer_loss_weight=given["add_loss"],
        input_prob=given["input_prob"],
        p=given["p"],
    )


def _compare_cache(case, facts, tensors, prefix, data) -> None:
    tolerance, rows = case["tolerance"], case["rows_stored"]
    limit = max(1e-3, 3 * facts["self_noise_after_1e_6"]["cache_inp_rel_to_max"])
    pairs = [("inp", data.quantized), ("sym", data.full), ("out", data.target)]
    pairs += [("temb_inp", c) for c in data.companions if f"{prefix}temb_inp" in tensors]
    for name, ours in pairs:
        stored = tensors[prefix + name]
        assert relative_to_max(ours[:rows], stored) <= limit, prefix + name
        rms = (ours[:rows] - stored).square().mean().sqrt() / stored.square().mean().sqrt()
        assert rms <= tolerance["cache_inp_rms_rel"], prefix + name


def _compare_course(facts, tensors, prefix, recorder) -> None:
    noise = facts["self_noise_after_1e_6"]["loss_rel"]
    error = curve_error(recorder.losses["total"], tensors[f"{prefix}loss.total"])
    assert error.max() <= max(3e-3, 3 * noise), facts["block"]
    for name, stride in facts["sample_strides"].items():
        final, stored = sampled(recorder.parameters[name], stride), tensors[f"{prefix}final.{name}"]
        if name.endswith("alpha"):
            assert (~((final - stored).abs() <= 0.01)).float().mean() <= 0.03, (facts["block"], name)
        else:
            assert relative_to_max(final, stored) <= 0.01, (facts["block"], name)

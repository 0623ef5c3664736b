"""The two phases of Q-Diffusion on one block, minibatches replayed (golden README 12.4)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edadm.quant.network import Bits, QuantModel, SitePlan
from edadm.reconstruction.loop import reconstruct_unit
from edadm.reconstruction.objective import UnitData
from edadm.reconstruction.passes import Arguments
from edadm.reconstruction.settings import TwoPhase
from tests.golden.cases import load
from tests.golden.official import block_module, quantizers_of
from tests.golden.replay import Recorder, Replay, assert_course_equals, curve_error


@pytest.fixture
def folder(golden):
    folder = golden / "eda_ddim" / "11_qdiffusion"
    return folder


def test_phase_weights_equals_official(folder, golden_unet, official_names):
    case, tensors = load(folder / "phase1_weights")
    given = case["settings"]
    settings = TwoPhase(
        given["iters"],
        1,
        batch=given["batch_size"],
        reg_weight=given["weight"],
        beta_start=given["b_range"][0],
        beta_end=given["b_range"][1],
        warmup=given["warmup"],
        layer_loss_weight=0,
    )
    unit, quantizers = _prepare(case, tensors, golden_unet, official_names, act_bits=32)
    recorder = Recorder(quantizers)
    reconstruct_unit(
        unit,
        _data(tensors, full=False),
        settings.phases()[0],
        Replay(tensors, {}, {}),
        regularised=lambda layer: layer.alphas[:1],  # the official code leaves out the second part of split shortcuts
        observe=recorder,
    )
    assert_course_equals(case, tensors, recorder)
    assert curve_error(recorder.losses["block"], tensors["loss.reconstruction"])[0] <= 1e-5
    stored = tensors["loss.rounding"]
    error = (torch.tensor(recorder.losses["rounding"]) - stored).abs()
    assert (error <= 1e-4 * stored).all()  # 07_adaround: round_loss_rel


def test_phase_activations_equals_official(folder, golden_unet, official_names):
    case, tensors = load(folder / "phase2_activations")
    given = case["settings"]
    settings = TwoPhase(
        1, given["iters"], lr_act=given["lr"], p_act=given["p"], batch=given["batch_size"], layer_loss_weight=0
    )
    unit, quantizers = _prepare(case, tensors, golden_unet, official_names, act_bits=case["act_bits"])
    recorder = Recorder(quantizers)
    reconstruct_unit(unit, _data(tensors, full=True), settings.phases()[1], Replay(tensors, {}, {}), observe=recorder)
    assert_course_equals(case, tensors, recorder)


def _prepare(case, tensors, unet, official_names, act_bits):
    network = QuantModel.wrap(unet, Bits(case["weight_bits"], act_bits), SitePlan())
    quantizers = quantizers_of(network, official_names, case["block"])
    for name, facts in case["quantizers"].items():
        quantizer, scale = quantizers[name], tensors[f"init.{name}.delta"]
        zero_point = tensors[f"init.{name}.zero_point"]
        if facts["symmetric"]:  # official codes are signed there, ours unsigned
            zero_point = zero_point + 2 ** (facts["bits"] - 1)
        assert quantizer.bits == facts["bits"], name
        quantizer.set(scale, zero_point)
    unit = next(u for u in network.units("block") if u.name == block_module(case["block"], official_names))
    for layer in unit.layers:
        for quantizer, part in zip(
            layer.weight_quantizers, layer.weight.tensor_split([layer.split] if layer.split else 1, 1)
        ):
            name = next(name for name, q in quantizers.items() if q is quantizer)
            packed = tensors.get(f"init.{name}.hard_up")
            if packed is not None:
                up = np.unpackbits(packed.numpy(), count=part.numel())
                quantizer.hard_up = torch.from_numpy(up).bool().view(part.shape)
        layer.invalidate()
    return unit, {name: q for name, q in quantizers.items() if name in case["quantizers"]}


def _data(tensors, full) -> UnitData:
    main, companions = tensors["cache.inp"], tuple(tensors[k] for k in ("cache.temb_inp",) if k in tensors)
    return UnitData(
        call=Arguments((main, *companions), {}).template(),
        full=main if full else None,
        quantized=None if full else main,
        companions=companions,
        target=tensors["cache.out"],
    )

"""What the learned rounding has come to: how much was still undecided, and how much differs from nearest.

EDA-DM trains without the regulariser that drives AdaRound's variables to 0 or 1, and fixes them by their sign in the
end; what is still soft then changes value in that moment (methods.md 8.1).
"""

from __future__ import annotations

import json
from typing import Any

import torch

from edadm import stages
from edadm.diagnostics.inputs import Inputs
from edadm.quant.layers import QuantLayer
from edadm.quant.network import QuantModel
from edadm.quant.quantizer import is_float, quantize_dequantize
from edadm.quant.rounding import per_channel


def measure(inputs: Inputs) -> dict[str, Any]:
    """Return for each unit, in execution order, two shares of its weights, and the block it lies in.

    ``undecided``: 0.05 < h < 0.95 at the end of the optimisation, as the reconstruction recorded it. ``changed``: the
    integer code differs from that of the nearest rounding in the same range.
    """
    run, finished, network = inputs.run, inputs.quantized, inputs.quantized_network()
    assert finished is not None
    original = dict(run.task.denoiser(run.device).named_parameters())
    changes = {name: changed(layer, original[f"{name}.weight"]) for name, layer in network.layers.items()}
    reports = json.loads((finished.folder / stages.REPORTS).read_text(encoding="utf-8"))
    blocks = {layer.name: unit.name for unit in network.units("block") for layer in unit.layers}
    units = [_unit(report, network, changes, blocks) for report in reports if report["undecided"] is not None]
    weights = sum(unit["weights"] for unit in units)
    return {
        "n": {"units": len(units), "weights": weights, "iterations": max(unit["iterations"] for unit in units)},
        "unit": {"undecided": "share of the weights", "changed": "share of the weights"},
        "units": units,
        "undecided": sum(unit["undecided"] * unit["weights"] for unit in units) / weights,
        "changed": sum(unit["changed"] * unit["weights"] for unit in units) / weights,
        "regulariser": run.settings["optimization"].get("reg_weight"),
    }


@torch.no_grad()
def changed(layer: QuantLayer, weight: torch.Tensor) -> tuple[int, int]:
    """Return how many integer codes of a finished layer are not those of the nearest rounding, and of how many."""
    if is_float(layer.bits.weight):
        return 0, 0
    parts = (weight,) if layer.split is None else (weight[:, : layer.split], weight[:, layer.split :])
    different = 0
    for codes, part, q in zip(layer.weight_codes(), parts, layer.weight_quantizers, strict=True):
        scale, zero_point = per_channel(q.scale, part), per_channel(q.zero_point, part)
        nearest = quantize_dequantize(part, scale, zero_point, q.levels)
        different += int(((nearest / scale).round() + zero_point != codes).sum())
    return different, weight.numel()


def _unit(
    report: dict[str, Any], network: QuantModel, changes: dict[str, tuple[int, int]], blocks: dict[str, str]
) -> dict[str, Any]:
    module = network.model.get_submodule(report["unit"])
    layers = [layer.name for layer in module.modules() if isinstance(layer, QuantLayer)]
    different, weights = (sum(counts) for counts in zip(*(changes[name] for name in layers), strict=True))
    return {
        "unit": report["unit"],
        "block": blocks[layers[0]],
        "phase": report["phase"],
        "iterations": report["iterations"],
        "weights": weights,
        "undecided": report["undecided"],
        "changed": different / weights,
    }

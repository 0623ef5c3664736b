"""What reconstruction does to the loss of each unit and of the layers inside it (the paper's Figure 4).

The claim: reconstructing whole blocks lowers the loss of the block and raises that of the layers in its front, which
fits the calibration rows and not the data; layer losses (FBR) lower both. So both losses are measured, on rows that
calibrated the network and on rows that did not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edadm.calibration.rows import CalibrationSet, take
from edadm.calibration.trajectories import Trajectories
from edadm.diagnostics.inputs import Inputs
from edadm.errors import EdadmError
from edadm.keys import ROWS_PER_PASS
from edadm.progress import Progress
from edadm.quant.network import QuantModel, Unit
from edadm.reconstruction.objective import LayerTap, layer_channels, output_channels, unit_output
from edadm.reconstruction.passes import Arguments, PausedPasses

ROWS = 128  # of each kind
NORMAL_95 = 1.96

Batch = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Network inputs x, times and the condition by name."""


def measure(inputs: Inputs) -> dict[str, Any]:
    """Return the loss of each unit's output and of each layer inside a block, before and after its reconstruction.

    Loss: squared difference to the full-precision network, summed over channels, mean over positions and rows. Both
    losses of a part see the input that the finished network gives it: "before", its weights are rounded to nearest and
    its activation scales are those of the ranges, "after", they are the learned ones. Held-out rows come from
    trajectories of other noise, at the same steps as the training rows. ``summary`` holds geometric means of after /
    before over the outputs of blocks and over front layers: all but the one that ends a block's main path.
    """
    training = first_rows(inputs.calibration_rows, ROWS)
    held_out, trajectories = rows_at_steps(inputs.held_out_trajectories, training.step)
    networks = Networks(inputs.full_precision_network(), inputs.network_of_ranges(), inputs.quantized_network())
    parts = part_losses(networks, training, held_out, inputs.progress)
    return {
        "n": {
            "training rows": len(training),
            "held-out rows": len(held_out),
            "held-out trajectories": len(set(trajectories)),
        },
        "unit": {"loss": "squared error summed over channels, mean over positions and rows"},
        "granularity": inputs.run.settings["reconstruction.granularity"],
        "parts": parts,
        "summary": summary(parts),
    }


@dataclass(frozen=True)
class Networks:
    """The same denoiser in full precision, with ranges only, and reconstructed."""

    full: QuantModel
    before: QuantModel
    after: QuantModel

    @property
    def units(self) -> list[tuple[Unit, Unit, Unit]]:
        """The units in execution order, each of the three networks."""
        return list(zip(*(network.units("block") for network in (self.full, self.before, self.after)), strict=True))


def first_rows(rows: CalibrationSet, count: int) -> CalibrationSet:
    """Return the first rows of a calibration set, which was shuffled when it was made."""
    condition = rows.condition and {name: tensor[:count] for name, tensor in rows.condition.items()}
    return CalibrationSet(rows.x[:count], rows.timestep[:count], rows.step[:count], condition, rows.null)


def rows_at_steps(along: Trajectories, steps: Tensor) -> tuple[CalibrationSet, list[int]]:
    """Return one row of the trajectories for each step, and which trajectory each is from.

    No trajectory gives two rows of one step before all others have given one.
    """
    if int(steps.max()) >= along.steps:
        raise EdadmError(
            f"the calibration rows come from step {int(steps.max()) + 1}, the sampler has {along.steps} steps: "
            "rows held out at the same steps need the sampler that made the calibration set"
        )
    seen: Counter[int] = Counter()
    numbers = []
    for step in steps.tolist():
        numbers.append((seen[step] + step) % along.count)
        seen[step] += 1
    return take(along, steps.numpy(), np.array(numbers)), numbers


@torch.no_grad()
def part_losses(
    networks: Networks, training: CalibrationSet, held_out: CalibrationSet, progress: Progress
) -> list[dict[str, Any]]:
    """Return the losses of every unit and of every layer inside one, on both kinds of rows."""
    batches = [*_batches(training), *_batches(held_out)]
    copies = 1 if training.null is None else 2  # of a row, one behind the other: guidance adds the null condition
    parts: list[dict[str, Any]] = []
    with ExitStack() as stack:
        full = stack.enter_context(_passes(networks.full, batches))
        quantized = stack.enter_context(_passes(networks.after, batches))
        units = networks.units
        for index, (reference, before, after) in enumerate(units):
            full.inputs(index)
            targets = _outputs(reference, partial(full.outputs, index))
            calls = quantized.inputs(index)
            learned = _outputs(after, partial(quantized.outputs, index))
            nearest = _outputs(before, partial(_call, before, calls))
            for name, target in targets.items():
                channels = _channels(after, name, target)
                found = [row_losses(outputs[name], target, channels) for outputs in (nearest, learned)]
                losses = [loss.view(-1, copies).mean(1) for loss in found]
                parts.append(_part(after, name, losses, len(training), float(target.square().mean()) * channels))
            progress("reconstruction losses", index + 1, len(units))
    return parts


def _batches(rows: CalibrationSet) -> list[Batch]:
    x, timestep, condition = rows.inputs()
    parts = [slice(start, start + ROWS_PER_PASS) for start in range(0, len(x), ROWS_PER_PASS)]
    return [(x[part], timestep[part], {name: tensor[part] for name, tensor in condition.items()}) for part in parts]


def _passes(network: QuantModel, batches: Sequence[Batch]) -> PausedPasses:
    device, family, units = next(network.parameters()).device, network.family, network.units("block")

    def forward(batch: int) -> object:
        x, timestep, condition = batches[batch]
        named = {name: tensor.to(device) for name, tensor in condition.items()}
        return network(x.to(device), timestep=timestep.to(device), **named)

    modules = [(unit.name, unit.module) for unit in units]
    again = [unit.name for unit in units if family.layer_runs_again(unit.name)]
    return PausedPasses(forward, len(batches), modules, shared=family.shared_arguments, again=again)


def _outputs(unit: Unit, run: Callable[[], list[Tensor]]) -> dict[str, Tensor]:
    """Run a unit on all batches and return its output and those of the layers inside it, rows concatenated."""
    layers = unit.layers if unit.kind == "block" else ()
    with LayerTap(layers) as tap:
        output = torch.cat(run())
        return {unit.name: output} | {layer.name: found for layer, found in zip(layers, tap.take(), strict=True)}


def _call(unit: Unit, calls: Sequence[Arguments]) -> list[Tensor]:
    return [unit_output(unit, call, call.tensors) for call in calls]


def _channels(unit: Unit, name: str, output: Tensor) -> int:
    if name == unit.name:
        return output_channels(unit, output)
    return layer_channels(unit, next(layer for layer in unit.layers if layer.name == name), output)


def row_losses(output: Tensor, target: Tensor, channels: int) -> Tensor:
    """Return the loss of each row, float64 (rows,); its mean is ``tensor_loss`` with p = 2."""
    return (output - target).square().flatten(1).mean(1).double().cpu() * channels


def _part(unit: Unit, name: str, losses: Sequence[Tensor], training: int, signal: float) -> dict[str, Any]:
    before, after = losses
    return {
        "unit": unit.name,
        "kind": unit.kind,
        "part": "output" if name == unit.name else name.removeprefix(f"{unit.name}."),
        "front": unit.kind == "block" and name not in (unit.name, unit.end),
        "signal": signal,
        "training": comparison(before[:training], after[:training]),
        "held_out": comparison(before[training:], after[training:]),
    }


def comparison(before: Tensor, after: Tensor) -> dict[str, Any]:
    """Return the mean losses, their ratio after / before and its 95 % interval over rows (delta method)."""
    first, second, rows = float(before.mean()), float(after.mean()), len(before)
    found: dict[str, Any] = {"before": first, "after": second, "ratio": None, "interval": None}
    if first > 0:
        found["ratio"] = ratio = second / first
        if rows > 1:
            deviation = float((after - ratio * before).std()) / math.sqrt(rows) / first
            found["interval"] = [ratio - NORMAL_95 * deviation, ratio + NORMAL_95 * deviation]
    return found


def summary(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return, for the outputs of blocks and for front layers, what became of their losses."""
    chosen = {
        "block outputs": [part for part in parts if part["kind"] == "block" and part["part"] == "output"],
        "front layers": [part for part in parts if part["front"]],
    }
    return {
        name: {rows: _means([part[rows] for part in found]) for rows in ("training", "held_out")}
        for name, found in chosen.items()
    }


def _means(compared: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the geometric mean ratio and how many intervals lie wholly below or above 1."""
    ratios = [found["ratio"] for found in compared if found["ratio"]]
    intervals = [found["interval"] for found in compared if found["interval"]]
    return {
        "parts": len(compared),
        "ratio": math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None,
        "lower": sum(high < 1 for _, high in intervals),
        "higher": sum(low > 1 for low, _ in intervals),
    }

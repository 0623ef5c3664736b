"""What a reconstruction needs of memory, from one forward pass without values; good to about a third.

Weights, cached tensors and what the passes hold are counted, since they follow from shapes. What computing needs beside
them is estimated from the layers' inputs and outputs, with factors that were measured on narrow networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch.func import functional_call

from edadm.quant.layers import LOGITS_AT_A_TIME, AttentionMatmul
from edadm.quant.network import QuantModel, Unit
from edadm.reconstruction.cache import PLACES
from edadm.reconstruction.loop import EVALUATION_ROWS
from edadm.reconstruction.objective import loss_layers
from edadm.reconstruction.parking import held_tensors
from edadm.reconstruction.passes import PausedPasses
from edadm.reconstruction.settings import EXCLUDED_LAYERS, Phase

PROBED = 3  # rows of the pass without values
PROCESS = 0.9 * 2**30  # bytes of Python and its libraries
FLOAT = 4
LEARNING = 32  # bytes a weight: rounding variable, gradient, moments, and what the soft weight takes on its way
SAVED_INPUT, SAVED_OUTPUT, SAVED_LOGITS = 3.0, 1.5, 3.25  # kept for backward, in bytes of layers and of logits
WORKING_LOGITS = 2.0  # on the way, beside what is kept
WORKING = 4.0  # tensors of the widest layer's size in a pass without gradients
SEARCHING = 4.5  # tensors of the observed one's size while its range is searched


@dataclass(frozen=True)
class UnitSize:
    """Bytes of one row at one unit, and its number of weights.

    inputs: of the main input and its companions. target: of the output. layer_targets: of the outputs of its layers in
    the layer losses, by which layer is excluded. waiting: what a pass holds that waits before the unit. layers_in,
    layers_out: summed over its layers. logits: of its attentions, summed. widest: the largest input and output of a
    layer together. widest_logits: of one attention.
    """

    name: str
    kind: str
    inputs: tuple[int, ...]
    target: int
    layer_targets: Mapping[str, int]
    waiting: int
    layers_in: int
    layers_out: int
    logits: int
    widest: int
    widest_logits: int
    weights: int

    def cached(self, phase: Phase) -> int:
        """Return the bytes that one row takes in the cache in a phase."""
        mains = (phase.input_prob < 1) + phase.quantized_prefix
        layers = self.layer_targets[phase.excluded_layer] if phase.layer_loss_weight else 0
        return mains * self.inputs[0] + sum(self.inputs[1:]) + self.target + layers

    def gradients(self, phase: Phase) -> float:
        """Return the bytes that one row of a minibatch takes from its forward to its backward pass."""
        kept = SAVED_INPUT * self.layers_in + SAVED_OUTPUT * self.layers_out + SAVED_LOGITS * self.logits
        passes = 2 if self.has_second_pass(phase) else 1
        return passes * kept + WORKING_LOGITS * self.widest_logits

    def has_second_pass(self, phase: Phase) -> bool:
        """Tell whether the layer losses come from a forward pass of their own."""
        drops = phase.drop_prob > 0 and phase.activations
        return self.kind == "block" and bool(phase.layer_loss_weight) and drops and phase.layer_loss_pass == "separate"


@dataclass(frozen=True)
class Need:
    """Bytes that a reconstruction needs.

    cached: of each unit for all rows. waiting: what the passes hold while a unit is optimised. peaks: the estimate for
    the network's ``device``, ``host`` and ``disk``; where the device is a CPU, all memory counts as the device's.
    known: the part of them that follows from shapes. present: what is taken already once the network is loaded.
    """

    place: str
    cached: Mapping[str, int]
    waiting: int
    peaks: Mapping[str, float]
    known: Mapping[str, float]
    present: Mapping[str, float]

    @property
    def largest(self) -> str:
        """The unit with the largest cache."""
        return max(self.cached, key=lambda name: self.cached[name])


@dataclass(frozen=True)
class Plan:
    """What decides how much is cached and computed at a time. rows: as the network sees them, guidance included."""

    phases: Callable[[str], Sequence[Phase]]
    rows: int
    rows_per_pass: int
    range_rows: int
    cpu: bool


def measure(
    network: QuantModel, sample: Sequence[torch.Tensor], names: Sequence[str] = (), granularity: str = "block"
) -> list[UnitSize]:
    """Return the sizes of a network's units in execution order; nothing is computed and no weight is read.

    sample: some rows as ``reconstruct`` takes them, names: as there. Switches quantization off.
    """
    network.set_state(weights=False, activations=False)
    units = network.units("layer" if granularity == "layer" else "block")
    rows = [torch.empty(PROBED, *part.shape[1:], dtype=part.dtype, device="meta") for part in sample]
    positional = len(rows) - len(names)
    named = dict(zip(names, rows[positional:], strict=True))
    own = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*network.named_parameters(), *network.named_buffers())
    }
    fixed = {tensor.untyped_storage()._cdata for tensor in (*own.values(), *rows)}
    again = [unit.name for unit in units if network.family.layer_runs_again(unit.name)]
    shared = network.family.shared_arguments

    def forward(_batch: int) -> object:
        return functional_call(network, own, tuple(rows[:positional]), named)

    passes = PausedPasses(forward, 1, [(unit.name, unit.module) for unit in units], 0, shared, again)
    with passes, torch.no_grad():
        return [_size(unit, passes, index, fixed) for index, unit in enumerate(units)]


def _size(unit: Unit, passes: PausedPasses, index: int, fixed: set[int]) -> UnitSize:
    inputs = tuple(_bytes(tensor) for tensor in passes.input(index, 0).tensors)
    held = {tensor.untyped_storage()._cdata: tensor for tensor in held_tensors(passes._passes[0], PROBED)}
    waiting = sum(tensor.untyped_storage().nbytes() for key, tensor in held.items() if key not in fixed) // PROBED
    layers: dict[str, tuple[int, int]] = {}
    logits: list[int] = []

    def layer_hook(layer: Any, positional: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        layers[layer.name] = _bytes(positional[0]), _bytes(output)

    def product_hook(product: AttentionMatmul, positional: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        q, k, v = positional[:3]
        layers[product.name] = _bytes(q) + _bytes(k) + _bytes(v), 0
        logits.append(FLOAT * q.shape[1] * q.shape[2] * k.shape[2])

    with ExitStack() as stack:
        for layer in unit.layers:
            stack.callback(layer.register_forward_hook(layer_hook, prepend=True).remove)
        for product in unit.matmuls:
            stack.callback(product.register_forward_hook(product_hook, prepend=True).remove)
        target = _bytes(passes.output(index, 0))
    return UnitSize(
        name=unit.name,
        kind=unit.kind,
        inputs=inputs,
        target=target,
        layer_targets={
            excluded: sum(layers[layer.name][1] for layer in loss_layers(unit, excluded))
            for excluded in EXCLUDED_LAYERS
        },
        waiting=waiting,
        layers_in=sum(before for before, _ in layers.values()),
        layers_out=sum(behind for _, behind in layers.values()),
        logits=sum(logits),
        widest=max(map(sum, layers.values())),
        widest_logits=max(logits, default=0),
        weights=sum(layer.weight.numel() for layer in unit.layers),
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.nbytes // PROBED


def need_at(network: QuantModel, units: Sequence[UnitSize], plan: Plan, place: str) -> Need:
    """Return what a reconstruction needs with its cache at a place."""
    weights = sum(tensor.nbytes for tensor in (*network.parameters(), *network.buffers()))
    masks = sum(unit.weights for unit in units)  # of the rounding, a byte each
    phases = {unit.name: plan.phases(unit.kind) for unit in units}
    cached = {unit.name: plan.rows * max(unit.cached(phase) for phase in phases[unit.name]) for unit in units}
    paths = max(1 + phase.quantized_prefix for phase in phases[units[0].name])
    waiting = paths * plan.rows * max(unit.waiting for unit in units)
    ranges = max(_observed(unit, plan) for unit in units) + weights  # beside them all quantized weights
    most = max(_computing(unit, phase, plan) for unit in units for phase in phases[unit.name])
    kept = max(cached.values()) + waiting
    where = "device" if plan.cpu and place == "host" else place
    here = {name: float(kept) if name == where else 0.0 for name in PLACES}
    process = {"device": PROCESS, "host": 0.0} if plan.cpu else {"device": 0.0, "host": PROCESS}
    known = {name: size + process.get(name, 0.0) for name, size in here.items()}
    known["device"] += weights + masks
    device = max(weights + ranges, weights + masks + here["device"] + most)
    peaks = {"device": device + process["device"], "host": here["host"] + process["host"], "disk": here["disk"]}
    present = process | {"device": weights + process["device"], "disk": 0.0}
    return Need(place, cached, waiting, peaks, known, present)


def _observed(unit: UnitSize, plan: Plan) -> float:
    return plan.range_rows * SEARCHING * max(unit.widest, unit.widest_logits)


def _computing(unit: UnitSize, phase: Phase, plan: Plan) -> float:
    """Return the bytes that the busiest moment of a unit takes: a pass, a look at the loss, or an iteration."""
    at_a_time = FLOAT * LOGITS_AT_A_TIME["cpu" if plan.cpu else "cuda"]

    def running(rows: int) -> float:
        return WORKING * (rows * unit.widest + min(rows * unit.widest_logits, at_a_time))

    passing = plan.rows_per_pass * unit.waiting + running(min(plan.rows, plan.rows_per_pass))
    looking = running(min(plan.rows, EVALUATION_ROWS))
    learned = LEARNING * unit.weights if phase.lr_weight is not None else 0
    return max(passing, looking, learned + phase.batch * unit.gradients(phase))

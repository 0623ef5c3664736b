"""What a unit is optimised for: its output and the outputs of the layers inside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

import torch
import torch.nn.functional as F

from edadm.quant.layers import QuantLayer
from edadm.quant.network import Unit
from edadm.quant.rounding import beta_schedule, regulariser
from edadm.reconstruction.passes import Arguments, one_tensor
from edadm.reconstruction.random import INPUT_MIX, RandomSource
from edadm.reconstruction.settings import Phase

Regularised = Callable[[QuantLayer], Iterable[torch.Tensor]]


@dataclass(frozen=True)
class UnitData:
    """What a unit is optimised on: tensors with one entry per calibration row, and the form of a call.

    full, quantized: main input in the full-precision network and behind the quantized prefix, None where not needed.
    companions: the other inputs (temb, context, mask, the second stream of a joint attention block).
    target: output of the unit in the full-precision network, several streams of tokens one after the other.
    layer_targets: outputs of ``loss_layers`` in the same forward pass.
    """

    call: Arguments
    full: torch.Tensor | None
    quantized: torch.Tensor | None
    companions: tuple[torch.Tensor, ...]
    target: torch.Tensor
    layer_targets: tuple[torch.Tensor, ...] = ()

    def at_inference(self) -> torch.Tensor:
        """The main input as the quantized network will see it, as far as it is known."""
        known = self.full if self.quantized is None else self.quantized
        assert known is not None
        return known

    @property
    def mebibytes(self) -> float:
        """Size of the cached tensors."""
        tensors = [self.full, self.quantized, *self.companions, self.target, *self.layer_targets]
        return sum(t.nbytes for t in tensors if t is not None) / 2**20


@dataclass(frozen=True)
class Losses:
    """The terms of one iteration, 0-d; layers are not yet weighted, rounding is."""

    total: torch.Tensor
    unit: torch.Tensor
    layers: tuple[torch.Tensor, ...] = ()
    rounding: torch.Tensor | None = None


def tensor_loss(output: torch.Tensor, target: torch.Tensor, channels: int, p: float) -> torch.Tensor:
    """Return |output - target|^p summed over channels and averaged over everything else (golden README 9.3).

    The place of the channel axis does not matter, so diffusers' linear attention projections (B, N, C) and the
    original 1x1 convolutions (B, C, h, w) give the same number.
    """
    mean = F.mse_loss(output, target) if p == 2 else (output - target).abs().pow(p).mean()
    return mean * channels


def device_of(unit: Unit) -> torch.device:
    """Return the device a unit computes on."""
    return next(unit.module.parameters()).device


def output_channels(unit: Unit, output: torch.Tensor) -> int:
    """Return the number of channels of a unit's output, (B, C, ...) or (B, N, C); of products (B, heads, N, d).

    Where the original code has tokens in axis 1 too, their number: its losses are sums over axis 1 (methods.md 3.0).
    """
    if unit.kind == "layer":
        return layer_channels(unit, unit.layers[0], output)
    if unit.kind == "matmul":
        return output.shape[1] * output.shape[3]
    return output.shape[2] if output.ndim == 3 and not unit.tokens else output.shape[1]


def layer_channels(unit: Unit, layer: QuantLayer, output: torch.Tensor) -> int:
    """Return the same for the output of a layer inside a unit."""
    return output.shape[1] if output.ndim == 3 and unit.tokens else len(layer.weight)


def unit_output(unit: Unit, call: Arguments, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the output of a unit in its present state, called in the form ``call`` with the tensors ``inputs``."""
    positional, named = call.bind(inputs)
    return one_tensor(unit.module(*positional, **named), unit.name)


def loss_layers(unit: Unit, excluded_layer: str) -> tuple[QuantLayer, ...]:
    """Return the layers whose outputs enter the layer losses, in registration order; none unless the unit is a block.

    excluded_layer: "registration" leaves out the layer that the original code registers last (official, golden README
    9.4), "main_path" the layer that ends the block's main path, whose output the loss of the block already covers.
    """
    if unit.kind != "block":
        return ()
    left_out = unit.last if excluded_layer == "registration" else unit.end
    return tuple(layer for layer in unit.layers if layer.name != left_out)


class LayerTap:
    """Record the outputs of layers while their unit runs; a context manager.

    stop: end the unit's forward pass by raising ``Recorded`` as soon as every layer has run, since what follows is not
    wanted. ``listening`` switches the tap off and on.
    """

    class Recorded(Exception):
        """All layers have run."""

    def __init__(self, layers: Sequence[QuantLayer], stop: bool = False):
        self.layers, self.stop, self.listening = layers, stop, True
        self._outputs: dict[QuantLayer, list[torch.Tensor]] = {layer: [] for layer in layers}

    def take(self) -> tuple[torch.Tensor, ...]:
        """Return the output of each layer since the last call, several forward passes concatenated over rows."""
        taken = tuple(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in self._outputs.values())
        self._outputs = {layer: [] for layer in self.layers}
        return taken

    def __enter__(self) -> LayerTap:
        self._handles = [layer.register_forward_hook(self._record) for layer in self.layers]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, layer: QuantLayer, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if not self.listening:
            return
        self._outputs[layer].append(output)
        if self.stop and all(self._outputs.values()):
            raise LayerTap.Recorded


class Objective:
    """The loss of a unit on one minibatch, as a function of the iteration (golden README 9.2); a context manager.

    Inside its context the activation quantizers of the unit drop elements as the phase says.
    """

    def __init__(
        self, unit: Unit, data: UnitData, phase: Phase, random: RandomSource, regularised: Regularised | None = None
    ):
        self.unit, self.data, self.phase, self.random, self.regularised = unit, data, phase, random, regularised
        self.device, self.iteration, self.pass_index = device_of(unit), 0, 0
        drops = phase.drop_prob > 0 and phase.activations
        self.dropping = unit.activation_quantizers if drops else []
        layers = loss_layers(unit, phase.excluded_layer) if phase.layer_loss_weight else ()
        # Without dropping the second forward pass would repeat the first.
        self.separate = phase.layer_loss_pass == "separate" and bool(self.dropping) and bool(layers)
        self.tap = LayerTap(layers, stop=self.separate)

    def __enter__(self) -> Objective:
        self.tap.__enter__()
        for quantizer in self.dropping:
            quantizer.drop = self._keep
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.tap.__exit__(kind, error, trace)
        for quantizer in self.dropping:
            quantizer.drop = None

    def __call__(self, iteration: int) -> Losses:
        self.iteration = iteration
        data, phase = self.data, self.phase
        rows = self.random.indices(iteration, len(data.target), phase.batch).to(data.target.device)
        inputs = [self._main_input(rows), *(self._gather(tensor, rows) for tensor in data.companions)]
        output, layer_outputs = self._run(inputs)
        unit_loss = self._loss(output, data.target, rows, output_channels(self.unit, output))
        layer_losses = tuple(
            self._loss(output, target, rows, layer_channels(self.unit, layer, output))
            for layer, output, target in zip(self.tap.layers, layer_outputs, data.layer_targets, strict=True)
        )
        rounding = self._rounding()
        total = unit_loss
        if layer_losses:
            total = total + phase.layer_loss_weight * sum(layer_losses)
        if rounding is not None:
            total = total + rounding
        return Losses(total, unit_loss, layer_losses, rounding)

    def _run(self, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return the output of the unit and of its tapped layers."""
        self.pass_index, self.tap.listening = 0, not self.separate
        output = unit_output(self.unit, self.data.call, inputs)
        if self.separate:
            self.pass_index, self.tap.listening = 1, True
            with suppress(LayerTap.Recorded):
                unit_output(self.unit, self.data.call, inputs)
        return output, self.tap.take()

    def _main_input(self, rows: torch.Tensor) -> torch.Tensor:
        p = self.phase.input_prob
        if p <= 0:
            return self._gather(self.data.full, rows)
        x = self._gather(self.data.quantized, rows)
        if p >= 1:
            return x
        mask = self.random.mask(self.iteration, INPUT_MIX, 0, x.shape, p, x.device)
        # lerp is faster than where, and as exact for weights of 0 and 1
        return torch.lerp(self._gather(self.data.full, rows), x, mask.to(x.dtype))

    def _gather(self, tensor: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
        assert tensor is not None
        return tensor.index_select(0, rows).to(self.device, non_blocking=True)

    def _loss(self, output: torch.Tensor, target: torch.Tensor, rows: torch.Tensor, channels: int) -> torch.Tensor:
        return tensor_loss(output, self._gather(target, rows), channels, self.phase.p)

    def _rounding(self) -> torch.Tensor | None:
        phase = self.phase
        if not phase.reg_weight or phase.lr_weight is None:
            return None
        beta = beta_schedule(self.iteration + 1, phase.iterations, phase.beta_start, phase.beta_end, phase.warmup)
        if beta is None:
            return None
        covered: list[torch.Tensor] = []
        for layer in self.unit.layers:
            if layer.alphas is not None:
                covered += layer.alphas if self.regularised is None else self.regularised(layer)
        return phase.reg_weight * regulariser(covered, beta) if covered else None

    def _keep(self, site: str, shape: torch.Size, device: torch.device) -> torch.Tensor:
        return self.random.mask(self.iteration, site, self.pass_index, shape, 1 - self.phase.drop_prob, device)

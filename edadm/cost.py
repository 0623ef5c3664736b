"""What a quantized network would cost: multiply-accumulates, bit operations and bytes.

Quantization is simulated, so these are counts and no measurements. Bit operations are MACs x weight bits x activation
bits (of both operands for a product of two activations). The size counts quantized weights at their bits and everything
else at 4 bytes, quantization parameters apart; MB are 10^6 bytes. With this rule the DDIM CIFAR-10 network has 398.9 G
bit operations and 35.9 MB at W8A8 (the paper says 402 and 35.9).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from edadm.errors import EdadmError

FP_BITS = 32
SCALE_BYTES = 4  # a float32 step
ZERO_POINT_BYTES = 1


@dataclass(frozen=True)
class Layer:
    """One matmul-like operation of a forward pass at batch size 1.

    ``kind`` is ``conv``, ``linear`` or ``matmul`` (an attention product: no weight, and the two bit widths are those of
    its operands). ``groups`` is the number of (step, zero point) sets per output channel: 2 where a concatenated input
    is split.
    """

    name: str
    kind: str
    macs: int
    weight_shape: tuple[int, ...] | None = None
    weight_bits: int = FP_BITS
    act_bits: int = FP_BITS
    groups: int = 1

    @property
    def weights(self) -> int:
        """Return the number of weights."""
        return math.prod(self.weight_shape) if self.weight_shape else 0

    @property
    def bit_operations(self) -> int:
        """Return MACs times both bit widths."""
        return self.macs * self.weight_bits * self.act_bits


def layers_of(descriptions: Iterable[Mapping[str, Any]]) -> list[Layer]:
    """Return layers from dicts ``name, kind, weight_shape, macs, weight_bits, act_bits[, groups]``."""
    found = []
    for fields in descriptions:
        shape = fields.get("weight_shape")
        found.append(Layer(**(dict(fields) | {"weight_shape": None if shape is None else tuple(shape)})))
    return found


def bit_operations(layers: Sequence[Layer]) -> dict[str, Any]:
    """Return MACs and bit operations of one forward pass, in total and by kind, and the ratio to 32 x 32 bits."""
    macs, bops = sum(layer.macs for layer in layers), sum(layer.bit_operations for layer in layers)
    full = macs * FP_BITS * FP_BITS
    kinds = sorted({layer.kind for layer in layers})
    return {
        "macs": macs,
        "bit_operations": bops,
        "bit_operations_fp": full,
        "ratio_to_fp": bops / full if full else None,
        "macs_by_kind": {kind: sum(layer.macs for layer in layers if layer.kind == kind) for kind in kinds},
    }


def model_size(
    layers: Sequence[Layer], parameters: int, *, act_quantizers: int = 0, act_sets: int = 1
) -> dict[str, float | int]:
    """Return the size of the network in MB, with the quantization parameters beside it.

    parameters: all of the network's, biases and norms included. act_quantizers: their number; act_sets: sets of
    activation parameters per quantizer (1 if static, the number of steps if per step). A weight at 16 bits or more has
    no quantization parameters.
    """
    weights = sum(layer.weights for layer in layers)
    if weights > parameters:
        raise ValueError(f"the layers hold {weights} weights, the network only {parameters} parameters")
    weight_bytes = sum(layer.weights * layer.weight_bits / 8 for layer in layers)
    quantized = [layer for layer in layers if layer.weight_shape and layer.weight_bits < 16]
    channel_sets = sum(layer.weight_shape[0] * layer.groups for layer in quantized if layer.weight_shape)
    sets = channel_sets + act_quantizers * act_sets
    return {
        "size_mb": (weight_bytes + 4 * (parameters - weights)) / 1e6,
        "size_fp_mb": 4 * parameters / 1e6,
        "quantization_parameters_mb": sets * (SCALE_BYTES + ZERO_POINT_BYTES) / 1e6,
        "weight_parameter_sets": channel_sets,
        "act_parameter_sets": act_quantizers * act_sets,
        "parameters": parameters,
    }


def measure(network: nn.Module, *inputs: Any, **named_inputs: Any) -> list[Layer]:
    """Return the layers that one forward pass of network runs, in execution order, with their MACs and 32 bits each.

    inputs: one example of batch size 1. Convolutions and linear layers go by their module's name; products of two
    activations (bmm, matmul, einsum, scaled_dot_product_attention) by the name of the module that runs them and
    ``.product0``, ``.product1``... A layer that runs twice has the MACs of both and its weights once.
    """
    counter = _Counter()
    with ExitStack() as stack, torch.no_grad():
        for name, module in network.named_modules():
            stack.callback(module.register_forward_pre_hook(counter.entering(name, module)).remove)
            stack.callback(module.register_forward_hook(counter.leaving(name)).remove)
        stack.enter_context(counter)
        network(*inputs, **named_inputs)
    return list(counter.layers.values())


def output_numbers(module: nn.Module, forward: Callable[[], object]) -> int:
    """Return how many numbers one row of a module's output has in a forward pass. Raises EdadmError unless it runs."""
    seen: list[torch.Tensor] = []

    def note(module: nn.Module, args: object, output: Any) -> None:
        seen[:] = [output if isinstance(output, torch.Tensor) else output[0]]

    handle = module.register_forward_hook(note)
    try:
        with torch.no_grad():
            forward()
    finally:
        handle.remove()
    if not seen:
        raise EdadmError("the module of the TDAC feature was not run by the network call: name another one")
    return seen[0][0].numel()


class _Counter(TorchDispatchMode):
    """Count the MACs of the modules that hooks report and of the products that run inside of other modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: dict[str, Layer] = {}
        self._running: list[tuple[str, nn.Module]] = []
        self._products: Counter[str] = Counter()

    def entering(self, name: str, module: nn.Module) -> Callable[..., None]:
        """Return the hook that notes that a module begins."""
        return lambda *_: self._running.append((name, module))

    def leaving(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        """Return the hook that counts a module that has run."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._running.pop()
            if isinstance(module, nn.Linear):
                self._add(name, "linear", output.numel() * module.in_features, module.weight)
            elif isinstance(module, _CONVOLUTIONS):
                self._add(name, "conv", output.numel() * module.weight[0].numel(), module.weight)

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it if it multiplies activations."""
        operation = func.overloadpacket.__name__
        weighted = self._running and isinstance(self._running[-1][1], (nn.Linear, *_CONVOLUTIONS))
        if not weighted:
            for macs in _products(operation, args):
                name = self._running[-1][0] if self._running else ""
                self._add(f"{name}.product{self._products[name]}".removeprefix("."), "matmul", macs, None)
                self._products[name] += 1
        return func(*args, **(kwargs or {}))

    def _add(self, name: str, kind: str, macs: int, weight: torch.Tensor | None) -> None:
        before = self.layers[name].macs if name in self.layers else 0
        self.layers[name] = Layer(name, kind, before + macs, None if weight is None else tuple(weight.shape))


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _products(operation: str, args: Sequence[Any]) -> list[int]:
    """Return the MACs of the activation products in one operation: q k^T and weights v for a fused attention."""
    if operation in ("bmm", "baddbmm"):
        one, other = args[:2] if operation == "bmm" else args[1:3]
        return [one.numel() * other.shape[-1]]
    if "scaled_dot_product" in operation:
        query, key, value = args[:3]
        return [query.numel() * key.shape[-2], query.numel() // query.shape[-1] * key.shape[-2] * value.shape[-1]]
    return []

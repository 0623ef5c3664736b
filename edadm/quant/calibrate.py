"""Set the ranges of a quantized network: weights first, then activations over batches of calibration rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from edadm.errors import EdadmError
from edadm.quant.network import QuantModel


def set_weight_ranges(network: QuantModel, ranges) -> None:
    """Set scale and zero point of every weight; depends on the weights alone."""
    for layer in network.layers.values():
        layer.set_weight_ranges(ranges)


@torch.no_grad()
def set_activation_ranges(
    network: QuantModel, ranges, batches: Iterable[Callable[[], object]], weights: bool = True
) -> None:
    """Run one forward pass per batch while every activation quantizer updates its range from what it sees.

    batches: callables that run the network on one batch of rows. A quantizer updates its range before it quantizes
    the batch, so later layers see inputs quantized with the ranges so far (golden README 7.2). Earlier ranges are
    forgotten.
    Raises EdadmError when a quantizer saw nothing.
    """
    network.set_state(weights=weights, activations=True)
    for quantizer in network.activation_quantizers:
        quantizer.reset_range()
        quantizer.observe = ranges
    try:
        for run in batches:
            run()
    finally:
        for quantizer in network.activation_quantizers:
            quantizer.observe = None
    unseen = [q.name for q in network.activation_quantizers if not q.ready]
    if unseen:
        raise EdadmError(f"no calibration data reached {', '.join(unseen[:5])}: give at least one batch of rows")

"""How the range of every quantized activation moves along the sampling trajectory (the paper's Figure 3).

A static quantizer has one range for all steps; where the activations of one step are far narrower than those of
another, that range fits neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edadm.calibration.rows import CalibrationSet, take
from edadm.diagnostics.inputs import Inputs
from edadm.quant.network import Bits, QuantModel
from edadm.quant.quantizer import ActivationQuantizer
from edadm.sampling.noise import numpy_rng

TRAJECTORIES = 32
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
SAMPLED = 2**15  # elements of a site in one forward pass that the quantiles are taken from
FLOAT = Bits(32, 32, 32)


def measure(inputs: Inputs) -> dict[str, Any]:
    """Return minimum, maximum and quantiles of each site at each step, and the range its quantizer has in the run.

    Of the full-precision network on the first trajectories that the run calibrates on. ``sites`` are in execution
    order, with lists of T entries in sampling order; the range of a site left in floating point is None.
    """
    run, along = inputs.run, inputs.trajectories
    network = QuantModel.wrap(run.task.denoiser(run.device), FLOAT, run.plan)
    count = min(TRAJECTORIES, along.count)
    seen: list[Mapping[str, Extent]] = []
    for step in range(along.steps):
        seen.append(extents(network, take(along, np.full(count, step)), run.settings["chunk"], run.device))
        inputs.progress("activation ranges along t", step + 1, along.steps)
    quantizers = _ranges(inputs.quantized_network()) if run.has_network else {}
    sites = [site for site in network.sites() if site.kind != "weight"]
    return {
        "n": {"trajectories": count, "steps": along.steps, "sampled elements": SAMPLED},
        "unit": {"range": "activation"},
        "timesteps": along.timesteps.tolist(),
        "quantiles": list(QUANTILES),
        "sites": [
            {
                "name": site.name,
                "role": site.role,
                "unit": site.unit,
                "min": [step[site.name].low for step in seen],
                "max": [step[site.name].high for step in seen],
                "quantiles": [step[site.name].quantiles() for step in seen],
                "quantizer": quantizers.get(site.name),
            }
            for site in sites
        ],
    }


class Extent:
    """Extrema of all values of one site at one step, and quantiles of some of them."""

    def __init__(self, name: str):
        self.low, self.high = float("inf"), float("-inf")
        self._sample: list[Tensor] = []
        self._rng = numpy_rng("activation_range", 0, name)

    def update(self, x: Tensor) -> None:
        """Take in a tensor of any shape."""
        low, high = x.aminmax()
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        flat = x.reshape(-1)
        if len(flat) > SAMPLED:
            flat = flat[torch.from_numpy(self._rng.integers(len(flat), size=SAMPLED)).to(flat.device)]
        self._sample.append(flat.cpu())

    def quantiles(self) -> list[float]:
        """Return the values at QUANTILES."""
        return torch.cat(self._sample).float().quantile(torch.tensor(QUANTILES)).tolist()


@torch.no_grad()
def extents(network: QuantModel, rows: CalibrationSet, batch: int, device: str) -> Mapping[str, Extent]:
    """Return what enters each activation quantizer of a network, wrapped in floating point (``FLOAT``), on some rows.

    Under guidance the rows count with the null condition and with their own. batch: rows in one forward pass.
    """
    x, timestep, condition = rows.inputs()
    with _watched(network) as seen:
        for start in range(0, len(x), batch):
            part = slice(start, start + batch)
            named = {name: tensor[part].to(device) for name, tensor in condition.items()}
            network(x[part].to(device), timestep=timestep[part].to(device), **named)
    return seen


@contextmanager
def _watched(network: QuantModel) -> Iterator[Mapping[str, Extent]]:
    quantizers = [module for module in network.modules() if isinstance(module, ActivationQuantizer)]
    seen = {quantizer.name: Extent(quantizer.name) for quantizer in quantizers}

    def look(quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(quantizer, ActivationQuantizer)
        seen[quantizer.name].update(args[0])

    handles = [quantizer.register_forward_pre_hook(look) for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.enabled = True  # the parts of split inputs and of attention products are formed, nothing is rounded
    try:
        yield seen
    finally:
        for quantizer, handle in zip(quantizers, handles, strict=True):
            quantizer.enabled = False
            handle.remove()


def _ranges(network: QuantModel) -> dict[str, dict[str, float]]:
    """Return the smallest and largest value that each activation quantizer of a network can give."""
    return {
        q.name: {
            "bits": q.bits,
            "low": float(-q.zero_point * q.scale),
            "high": float((q.levels - 1 - q.zero_point) * q.scale),
        }
        for q in network.activation_quantizers
    }

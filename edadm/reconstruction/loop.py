"""Optimise the rounding of the weights and the activation scales of one unit."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from edadm.errors import Diverged, EdadmError
from edadm.quant.network import Unit
from edadm.quant.rounding import rectified_sigmoid
from edadm.reconstruction.objective import (
    Losses,
    Objective,
    Regularised,
    UnitData,
    device_of,
    output_channels,
    tensor_loss,
    unit_output,
)
from edadm.reconstruction.random import RandomSource
from edadm.reconstruction.settings import Phase

logger = logging.getLogger(__name__)

SMALLEST_SCALE = 1e-8  # the official code has no guard: a scale can turn negative (golden README 14.21)
CHECK_EVERY = 100  # iterations between two looks at the losses, since each look waits for the device
EVALUATION_ROWS = 64  # rows that show the loss before and after; all of them would cost as much as many iterations


@dataclass(frozen=True)
class Step:
    """One iteration, counted from 0, as an observer sees it: after the backward pass, before the update."""

    unit: Unit
    phase: Phase
    data: UnitData
    iteration: int
    losses: Losses


@dataclass(frozen=True)
class UnitReport:
    """What one phase did to one unit.

    loss_before, loss_after: ``evaluate`` with nearest and with learned rounding.
    undecided: share of the rounding variables that ended between 0.05 and 0.95, None without any.
    """

    unit: str
    phase: str
    iterations: int
    seconds: float
    loss_before: float
    loss_after: float
    undecided: float | None


def reconstruct_unit(
    unit: Unit,
    data: UnitData,
    phase: Phase,
    random: RandomSource,
    *,
    regularised: Regularised | None = None,
    observe: Callable[[Step], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> UnitReport:
    """Optimise one unit in place and fix its rounding.

    regularised: rounding variables of a layer that the regulariser covers, all by default. progress: called with the
    number of iterations done. observe: called in every iteration. Raises Diverged naming unit and iteration when a
    loss is NaN or Inf; EdadmError when the batch exceeds the rows.
    """
    if phase.batch > len(data.target):
        raise EdadmError(
            f"batch of {phase.batch} rows asked for, but there are {len(data.target)} calibration rows: "
            "lower the batch or collect more rows"
        )
    start = time.perf_counter()
    _set_state(unit, phase)
    before = evaluate(unit, data, phase)
    variables = _Variables(unit, phase)
    iterations = phase.iterations if variables.all else 0
    with variables.training(), torch.enable_grad():
        if iterations:
            with Objective(unit, data, phase, random, regularised) as objective:
                _optimise(objective, variables, observe, progress)
        undecided = variables.undecided()
    after = evaluate(unit, data, phase)
    seconds = time.perf_counter() - start
    logger.info(
        "%s of %s: %d iterations, loss %.4g to %.4g, %.1f s", phase.name, unit.name, iterations, before, after, seconds
    )
    return UnitReport(unit.name, phase.name, iterations, seconds, before, after, undecided)


@torch.no_grad()
def evaluate(unit: Unit, data: UnitData, phase: Phase) -> float:
    """Return the loss of the unit's output over the first rows in the unit's present state, with nothing dropped."""
    rows = slice(min(len(data.target), EVALUATION_ROWS))
    inputs = [tensor[rows].to(device_of(unit)) for tensor in (data.at_inference(), *data.companions)]
    output = unit_output(unit, data.call, inputs)
    return tensor_loss(output, data.target[rows].to(output.device), output_channels(unit, output), phase.p).item()


class _Variables:
    """What is trained in a unit in one phase; switches the unit to training and back."""

    def __init__(self, unit: Unit, phase: Phase):
        self.unit, self.phase = unit, phase
        self.rounds = phase.lr_weight is not None
        self.alphas = [alpha for layer in unit.layers for alpha in layer.start_rounding()] if self.rounds else []
        self.quantizers = unit.activation_quantizers if phase.activations else []
        self.scales = [q.scale for q in self.quantizers] if phase.lr_act is not None else []
        self.all: list[torch.Tensor] = [*self.alphas, *self.scales]

    @contextmanager
    def training(self) -> Iterator[None]:
        """Switch gradients on; in the end fix the rounding and switch gradients off."""
        for layer in self.unit.layers:
            layer.edges = self.phase.edges
        for quantizer in self.quantizers:
            quantizer.training_grad, quantizer.edges = True, self.phase.edges
            quantizer.scale.requires_grad_(self.phase.lr_act is not None)
        try:
            yield
        finally:
            for quantizer in self.quantizers:
                quantizer.training_grad = False
                quantizer.scale.requires_grad_(False)
                quantizer.scale.grad = None
            for layer in self.unit.layers if self.rounds else ():
                layer.finish_rounding()

    @torch.no_grad()
    def undecided(self) -> float | None:
        """Return the share of rounding variables between 0.05 and 0.95."""
        if not self.alphas:
            return None
        h = torch.cat([rectified_sigmoid(alpha).flatten() for alpha in self.alphas])
        return ((h > 0.05) & (h < 0.95)).float().mean().item()


def _optimise(
    objective: Objective,
    variables: _Variables,
    observe: Callable[[Step], None] | None,
    progress: Callable[[int], None] | None,
) -> None:
    """Minimise the objective with Adam; learning rates follow half a cosine to 0 unless the phase keeps them."""
    unit, phase, data = objective.unit, objective.phase, objective.data
    rates = [(variables.alphas, phase.lr_weight, phase.cosine_weight), (variables.scales, phase.lr_act, True)]
    groups = [{"params": params, "lr": lr, "base": lr, "cosine": cosine} for params, lr, cosine in rates if params]
    adam = torch.optim.Adam(groups, fused=True)
    curve = torch.zeros(phase.iterations, device=objective.device)
    for iteration in range(phase.iterations):
        factor = (1 + math.cos(math.pi * iteration / phase.iterations)) / 2
        for group in adam.param_groups:
            group["lr"] = group["base"] * (factor if group["cosine"] else 1.0)
        adam.zero_grad(set_to_none=True)
        losses = objective(iteration)
        losses.total.backward()
        if observe is not None:
            observe(Step(unit, phase, data, iteration, losses))
        adam.step()
        with torch.no_grad():
            curve[iteration] = losses.total
            if variables.scales:
                torch._foreach_clamp_min_(list[torch.Tensor](variables.scales), SMALLEST_SCALE)
        if (iteration + 1) % CHECK_EVERY == 0 or iteration + 1 == phase.iterations:
            _check_finite(unit, phase, curve[: iteration + 1])
            if progress is not None:
                progress(iteration + 1)


def _set_state(unit: Unit, phase: Phase) -> None:
    for layer in unit.layers:
        layer.weight_enabled = True
    for quantizer in unit.activation_quantizers:
        quantizer.enabled = phase.activations


def _check_finite(unit: Unit, phase: Phase, curve: torch.Tensor) -> None:
    bad = (~torch.isfinite(curve)).nonzero().flatten().tolist()
    if bad:
        raise Diverged(
            f"loss of unit {unit.name} is {curve[bad[0]].item()} at iteration {bad[0] + 1} of phase {phase.name}: "
            "lower its learning rates, or check weights and calibration rows for NaN or Inf"
        )

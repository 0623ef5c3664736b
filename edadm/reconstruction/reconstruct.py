"""Reconstruct a quantized network unit by unit against its own full-precision activations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch

from edadm.errors import EdadmError
from edadm.quant.layers import QuantLayer
from edadm.quant.network import QuantModel, Unit, load_unit_state, unit_state
from edadm.reconstruction.cache import Cache
from edadm.reconstruction.loop import Step, UnitReport, reconstruct_unit
from edadm.reconstruction.objective import LayerTap, UnitData, loss_layers
from edadm.reconstruction.parking import Parking
from edadm.reconstruction.passes import Arguments, PausedPasses
from edadm.reconstruction.random import RandomFactory
from edadm.reconstruction.settings import Optimization, Phase

logger = logging.getLogger(__name__)

GRANULARITIES = ("layer", "block", "fbr")
RANGES = "activation_ranges"

State = Mapping[str, torch.Tensor]
OnUnit = Callable[[str, dict[str, torch.Tensor], UnitReport | None], None]
Progress = Callable[[str, int, int], None]


def reconstruct(
    network: QuantModel,
    rows: Sequence[torch.Tensor],
    settings: Optimization,
    granularity: str,
    random: RandomFactory,
    *,
    set_activation_ranges: Callable[[], None] | None = None,
    done: Mapping[str, State] | None = None,
    on_unit: OnUnit | None = None,
    progress: Progress | None = None,
    observe: Callable[[Step], None] | None = None,
    rows_per_pass: int = 32,
    cache: Cache | None = None,
    limit: int | None = None,
    names: Sequence[str] = (),
) -> list[UnitReport]:
    """Optimise rounding and activation scales of all units in execution order; return one report per unit and phase.

    network: with weight ranges set. rows: the calibration rows as the network takes them, each tensor (rows, ...): x,
    timestep and, where there is one, condition. names: of the last of them, those that the network takes by name.
    granularity: "layer", "block", or "fbr" (blocks with layer losses).
    random: ``seeded(seed)`` or a replay. set_activation_ranges: called before the first phase that quantizes
    activations; without it their ranges must be set. rows_per_pass: rows in one forward pass of the network.
    cache: where cached inputs and targets lie, and what the paused passes hold; by default on the network's device. It
    changes no result of a CPU. limit: stop after that many units.

    on_unit(key, state, report) is called after each unit of each phase, and (report None) after
    ``set_activation_ranges``. ``done`` gives such states back by key: they are restored, not computed again, and the
    result is the same to the bit. progress(stage, iterations done, of how many); observe: called in every iteration.
    Raises Diverged naming unit and iteration.
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"granularity is {granularity!r}: choose one of {', '.join(GRANULARITIES)}")
    units = network.units("layer" if granularity == "layer" else "block")[:limit]
    batches = _batches(rows, rows_per_pass)
    reports, ranges_set = [], False
    with cache or Cache() as place:
        run = _Run(network, units, batches, random, dict(done or {}), on_unit, progress, observe, place, names)
        for number, phase in enumerate(settings.phases()):
            if phase.activations and not ranges_set:
                run.ensure_ranges(set_activation_ranges)
                ranges_set = True
            reports += run.phase([_phase(settings, number, unit, granularity) for unit in units])
    network.set_state(weights=True, activations=True)
    return reports


@dataclass
class _Run:
    """The network, the units and the rows of one reconstruction, and who is told about its progress."""

    network: QuantModel
    units: list[Unit]
    batches: list[tuple[torch.Tensor, ...]]
    random: RandomFactory
    done: dict[str, State]
    on_unit: OnUnit | None
    progress: Progress | None
    observe: Callable[[Step], None] | None
    cache: Cache
    names: Sequence[str]

    def phase(self, phases: Sequence[Phase]) -> list[UnitReport]:
        """Run one phase over all units, ``phases`` holding its settings per unit; return the reports of new results."""
        first = self._restore(phases)
        reports: list[UnitReport] = []
        if first == len(self.units):
            return reports
        _forget_quantized(self.network.layers.values())
        with ExitStack() as stack:
            full = stack.enter_context(self._passes(first))
            quantized = None
            if phases[0].quantized_prefix:
                quantized = stack.enter_context(self._passes(first))
            for index in range(first, len(self.units)):
                unit, phase = self.units[index], phases[index]
                report = reconstruct_unit(
                    unit,
                    self._collect(index, phase, full, quantized),  # held by nobody else, so that one unit's is alive
                    phase,
                    self.random(phase.name, unit.name),
                    observe=self.observe,
                    progress=self._progress(phase, index),
                )
                reports.append(report)
                self._tell(_key(phase, unit), unit_state(unit), report)
        return reports

    def ensure_ranges(self, set_activation_ranges: Callable[[], None] | None) -> None:
        """Set the ranges of the activation quantizers, or restore them from an earlier run."""
        quantizers = self.network.activation_quantizers
        if RANGES in self.done:
            for q in quantizers:
                q.set(self.done[RANGES][f"{q.name}.scale"], self.done[RANGES][f"{q.name}.zero_point"])
        elif set_activation_ranges is not None:
            set_activation_ranges()
            state = {f"{q.name}.scale": q.scale.detach().clone() for q in quantizers}
            state |= {f"{q.name}.zero_point": q.zero_point.clone() for q in quantizers}
            self._tell(RANGES, state, None)
        unset = [q.name for q in quantizers if not q.ready]
        if unset:
            raise EdadmError(
                f"activation ranges are not set: {', '.join(unset[:5])}; set them before reconstruction "
                "or give set_activation_ranges"
            )

    def _restore(self, phases: Sequence[Phase]) -> int:
        """Load the states of the leading units that are done and return their number; forget all that come later."""
        keys = [_key(phase, unit) for phase, unit in zip(phases, self.units, strict=True)]
        for number, (key, unit) in enumerate(zip(keys, self.units, strict=True)):
            if key not in self.done:
                self.done = {}
                return number
            load_unit_state(unit, self.done[key])
        return len(keys)

    def _passes(self, first: int) -> PausedPasses:
        family, modules = self.network.family, [(unit.name, unit.module) for unit in self.units]
        again = [unit.name for unit in self.units if family.layer_runs_again(unit.name)]
        parking = None
        if self.cache.is_apart_from(self._device):
            inputs = (part for batch in self.batches for part in batch)
            fixed = (*self.network.parameters(), *self.network.buffers(), *inputs)
            parking = Parking(self.cache, self._device, fixed)
        return PausedPasses(self._forward, len(self.batches), modules, first, family.shared_arguments, again, parking)

    @property
    def _device(self) -> torch.device:
        return next(self.network.parameters()).device

    def _forward(self, batch: int) -> object:
        parts = [part.to(self._device) for part in self.batches[batch]]
        positional = len(parts) - len(self.names)
        return self.network(*parts[:positional], **dict(zip(self.names, parts[positional:], strict=True)))

    def _collect(self, index: int, phase: Phase, full: PausedPasses, quantized: PausedPasses | None) -> UnitData:
        """Move the passes on to unit ``index`` and cache what it is optimised on."""
        unit = self.units[index]
        forms: list[Arguments] = []
        used = slice(0 if phase.input_prob < 1 else 1, 1 if quantized else None)  # of the full-precision inputs

        def in_full(tap: LayerTap) -> Iterator[list[torch.Tensor]]:
            for batch in range(len(self.batches)):
                call = full.input(index, batch)
                forms[:] = forms or [call.template()]
                inputs = call.tensors[used]
                yield [full.output(index, batch), *tap.take(), *inputs]

        def behind_prefix(passes: PausedPasses) -> Iterator[list[torch.Tensor]]:
            for batch in range(len(self.batches)):
                yield passes.input(index, batch).tensors

        self.network.set_state(weights=False, activations=False)
        with LayerTap(loss_layers(unit, phase.excluded_layer) if phase.layer_loss_weight else ()) as tap:
            target, *others = self._stack(in_full(tap))
        full.rest()
        layer_targets, inputs = others[: len(tap.layers)], others[len(tap.layers) :]
        main = inputs.pop(0) if phase.input_prob < 1 else None
        after_prefix, companions = None, inputs
        if quantized:
            self.network.set_state(weights=True, activations=phase.activations)
            after_prefix, *companions = self._stack(behind_prefix(quantized))
            quantized.rest()
        _forget_quantized(layer for done in self.units[:index] for layer in done.layers)
        data = UnitData(forms[0], main, after_prefix, tuple(companions), target, tuple(layer_targets))
        logger.debug("%s: %.1f MiB cached", unit.name, data.mebibytes)
        return data

    def _stack(self, batches: Iterator[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
        # a unit may get several rows for each of the network's (PixArt's resolution, height and width apart)
        return self.cache.stack(batches, [len(batch[0]) for batch in self.batches])

    def _progress(self, phase: Phase, index: int) -> Callable[[int], None] | None:
        if self.progress is None:
            return None
        tell, total = self.progress, phase.iterations * len(self.units)
        return lambda iterations: tell(f"reconstruction, {phase.name}", phase.iterations * index + iterations, total)

    def _tell(self, key: str, state: dict[str, torch.Tensor], report: UnitReport | None) -> None:
        if self.on_unit is not None:
            self.on_unit(key, state, report)


def _phase(settings: Optimization, number: int, unit: Unit, granularity: str) -> Phase:
    phase = settings.phases(unit.kind)[number]
    return phase if granularity == "fbr" else replace(phase, layer_loss_weight=0.0)


def _forget_quantized(layers: Iterable[QuantLayer]) -> None:
    """Free quantized weights that were kept: together they would take as much memory as the network itself."""
    for layer in layers:
        layer.invalidate()


def _key(phase: Phase, unit: Unit) -> str:
    return f"{phase.name}.{unit.name}"


def _batches(rows: Sequence[torch.Tensor], rows_per_pass: int) -> list[tuple[torch.Tensor, ...]]:
    lengths = {len(part) for part in rows}
    if len(lengths) != 1:
        raise EdadmError(f"the tensors of the calibration rows have different lengths: {sorted(lengths)}")
    return list(zip(*(part.split(rows_per_pass) for part in rows), strict=True))

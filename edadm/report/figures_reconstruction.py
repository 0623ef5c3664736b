"""Figure 4, what reconstruction does to the losses of blocks and layers, and the rounding it ends with."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edadm.diagnostics.files import Diagnostic
from edadm.records import Record
from edadm.report.figures_pairs import Measured, by_line, by_task, counts, groups, measured, spaced
from edadm.report.figures_style import COLOURS, MARKERS, PAGE, legend_below, new_figure, ratio_axis, save, styled

ROWS = {"training": "calibration rows", "held_out": "held-out rows"}


@styled
def fig4(records: Sequence[Record], diagnostics: Sequence[Diagnostic], folder: Path) -> list[Path]:
    """Draw loss after / before reconstruction of blocks and of their front layers: means, and unit by unit."""
    written = []
    for suffix, pairs in by_task(measured(records, diagnostics, "reconstruction_loss")).items():
        written += save(_means(pairs), folder / f"fig4_reconstruction_loss{suffix}.png")
        written += save(_units(pairs), folder / f"fig4_reconstruction_loss_units{suffix}.png")
    return written


@styled
def soft_rounding(records: Sequence[Record], diagnostics: Sequence[Diagnostic], folder: Path) -> list[Path]:
    """Draw, unit by unit, the share of rounding variables left undecided and of weights not rounded to nearest."""
    written = []
    for suffix, pairs in by_task(measured(records, diagnostics, "soft_rounding")).items():
        written += save(_rounding(pairs), folder / f"soft_rounding{suffix}.png")
    return written


def _means(pairs: list[Measured]) -> Any:
    """Return geometric mean ratios, one line a method; bars span the seeds."""
    labelled = by_line(pairs)
    figure = new_figure(PAGE, 1.1 + 0.42 * len(labelled))
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, what in zip(panels, ("block outputs", "front layers")):
        for index, found in enumerate(labelled.values()):
            for shift, (rows, name) in zip((-0.12, 0.12), ROWS.items()):
                ratios = [pair.values["summary"][what][rows]["ratio"] for pair in found]
                _dot(axes, [r for r in ratios if r], index + shift, rows, name if index == 0 else None)
        axes.axvline(1, color="black", lw=0.8)
        parts = sorted({pair.values["summary"][what]["training"]["parts"] for pair in pairs})
        axes.set_title(f"{what} ({' / '.join(map(str, parts))} per network)")
        axes.set_xlabel("loss after / before reconstruction,\ngeometric mean over the parts")
    panels[0].set_yticks(range(len(labelled)), [_label(label, found) for label, found in labelled.items()])
    panels[0].set_ylim(len(labelled) - 0.5, -0.5)
    legend_below(figure, panels[0])
    figure.suptitle(f"{pairs[0].record.task}: {_rows(pairs)}", fontsize=8)
    return figure


def _dot(axes: Any, ratios: list[float], y: float, rows: str, name: str | None) -> None:
    if not ratios:
        return
    colour, filled = (COLOURS[0], COLOURS[0]) if rows == "training" else (COLOURS[1], "white")
    mean = statistics.fmean(ratios)
    axes.plot([min(ratios), max(ratios)], [y, y], color=colour, lw=1)
    axes.plot([mean], [y], MARKERS[rows != "training"], color=colour, mfc=filled, label=name)


def _units(pairs: list[Measured]) -> Any:
    """Return the held-out ratio of every unit's output, and of the front layers of every block together."""
    labelled = by_line(pairs)
    units = _names(pairs)
    figure = new_figure(PAGE, 4.6 + 0.15 * len(labelled))
    panels = figure.subplots(2, 1, sharex=True)
    for axes, front, title in zip(panels, (False, True), ("output of the unit", "front layers of the block")):
        for index, (label, found) in enumerate(labelled.items()):
            for rows, style in (("held_out", "-"), ("training", ":")):
                curve = [_mean_over_seeds(found, unit, front, rows) for unit in units]
                axes.plot(
                    range(len(units)), curve, style, color=COLOURS[index % len(COLOURS)],
                    marker=MARKERS[index % len(MARKERS)] if rows == "held_out" else None, ms=3,
                    label=_label(label, found) if rows == "held_out" else None,
                )  # fmt: skip
        axes.axhline(1, color="black", lw=0.8)
        axes.set_yscale("log")
        ratio_axis(axes.yaxis, *axes.get_ylim())
        axes.set_title(f"{title}; solid: held-out rows, dotted: calibration rows", fontsize=8)
        axes.set_ylabel("loss after / before")
    unit_axis(panels[1], units)
    legend_below(figure, panels[0])
    figure.suptitle(f"{pairs[0].record.task}: {_rows(pairs)}", fontsize=8)
    return figure


def _label(label: str, found: Sequence[Measured]) -> str:
    """Return the label of a line with the granularity, where the label does not name it, and the number of seeds."""
    granularity = "" if "reconstruction=" in label else f", {found[0].values['granularity']}"
    return f"{label}{granularity} ({_seeds(found)})"


def unit_axis(axes: Any, units: Sequence[str]) -> None:
    """Label an axis of units in execution order with the parts of the network where they begin."""
    starts = spaced(groups(units), len(units))
    axes.set_xticks([start for start, _ in starts], [name for _, name in starts], rotation=40, ha="right")
    axes.set_xlabel(f"{len(units)} units in execution order")


def _mean_over_seeds(found: Sequence[Measured], unit: str, front: bool, rows: str) -> float:
    """Return the geometric mean ratio of a unit's output or front layers over seeds, NaN where there are none."""
    ratios = [
        part[rows]["ratio"]
        for pair in found
        for part in pair.values["parts"]
        if part["unit"] == unit and (part["front"] if front else part["part"] == "output") and part[rows]["ratio"]
    ]
    return math.exp(statistics.fmean(map(math.log, ratios))) if ratios else math.nan


def _rounding(pairs: list[Measured]) -> Any:
    labelled = by_line(pairs)
    blocks = list(dict.fromkeys(unit["block"] for pair in pairs for unit in pair.values["units"]))
    figure = new_figure(PAGE, 4.4 + 0.15 * len(labelled))
    panels = figure.subplots(2, 1, sharex=True)
    titles = {
        "undecided": "undecided when the optimisation ends, 0.05 < h < 0.95",
        "changed": "rounded otherwise than to nearest",
    }
    for axes, (what, title) in zip(panels, titles.items()):
        for index, (label, found) in enumerate(labelled.items()):
            curve = [_share(found, block, what) for block in blocks]
            whole = statistics.fmean(100 * pair.values[what] for pair in found)
            axes.plot(
                range(len(blocks)), curve, color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)],
                ms=3, label=f"{label} ({_seeds(found)}; {counts(found, 'iterations').replace('n=', '')} iterations)",
            )  # fmt: skip
            axes.axhline(whole, color=COLOURS[index % len(COLOURS)], lw=0.6, ls=":")
        axes.set_title(f"{title}; dotted: whole network")
        axes.set_ylabel("share of the weights (%)")
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
    unit_axis(panels[1], blocks)
    legend_below(figure, panels[0])
    figure.suptitle(f"{pairs[0].record.task}: {counts(pairs, 'weights')} weights", fontsize=8)
    return figure


def _share(found: Sequence[Measured], block: str, what: str) -> float:
    """Return the share of the weights of a block in percent, mean over seeds; its units may be single layers."""
    units = [one for pair in found for one in pair.values["units"] if one["block"] == block]
    weights = sum(one["weights"] for one in units)
    return 100 * sum(one[what] * one["weights"] for one in units) / weights if weights else math.nan


def _names(pairs: Sequence[Measured]) -> list[str]:
    return list(dict.fromkeys(part["unit"] for pair in pairs for part in pair.values["parts"]))


def _seeds(found: Sequence[Measured]) -> str:
    return f"{len(found)} seed{'s' if len(found) > 1 else ''}"


def _rows(pairs: Sequence[Measured]) -> str:
    training, held_out = counts(pairs, "training rows"), counts(pairs, "held-out rows")
    trajectories = counts(pairs, "held-out trajectories").removeprefix("n=")
    return f"{training} calibration rows, {held_out} held-out rows of {trajectories} trajectories"

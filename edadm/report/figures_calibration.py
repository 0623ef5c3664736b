"""Figures 5 and 11: which rows the samplers choose, and what TDAC's scores follow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edadm.diagnostics.files import Diagnostic
from edadm.records import Record
from edadm.report.figures_pairs import Measured, first_of_each_task, measured
from edadm.report.figures_style import COLOURS, MARKERS, PAGE, new_figure, save, step_axis, styled


@styled
def fig5(records: Sequence[Record], diagnostics: Sequence[Diagnostic], folder: Path) -> list[Path]:
    """Draw the rows of each sampler along t and among the features of the trajectories; one run of each task."""
    written = []
    for suffix, one in first_of_each_task(measured(records, diagnostics, "sample_distribution")).items():
        written += save(_samples(one), folder / f"fig5_sample_distribution{suffix}.png")
    return written


@styled
def fig11(records: Sequence[Record], diagnostics: Sequence[Diagnostic], folder: Path) -> list[Path]:
    """Draw density beside NDTC's share of the rows and variety beside the quantization loss; one run of each task."""
    written = []
    for suffix, one in first_of_each_task(measured(records, diagnostics, "scores")).items():
        written += save(_scores(one), folder / f"fig11_scores{suffix}.png")
    return written


def _samples(one: Measured) -> Any:
    values = one.values
    samplers = {name: found for name, found in values["samplers"].items() if "counts" in found}
    n, steps = values["n"], values["n"]["steps"]
    figure = new_figure(PAGE, 4.6)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.15))
    axes = upper.subplots()
    for index, (name, found) in enumerate(samplers.items()):
        label = f"{name}: {found['total_variation']:.2f}"
        axes.plot(
            range(1, steps + 1), found["counts"], color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)], ms=3, label=label,
        )  # fmt: skip
    axes.axhline(n["rows"] / steps, color="black", ls="--", lw=0.9, label="the trajectories' own")
    axes.set_ylim(bottom=0)
    step_axis(axes)
    axes.set_ylabel(f"rows per step, n={n['rows']}")
    handles, names = axes.get_legend_handles_labels()
    upper.legend(handles, names, loc="outside right center", frameon=False, title="total variation\nto equal shares")
    chance = sorted(values["by_chance"])
    upper.suptitle(f"{one.record.task}, seed {one.record.seed}, {n['trajectories']} trajectories", fontsize=8)
    panels = lower.subplots(1, len(samplers), sharex=True, sharey=True, squeeze=False)[0]
    for panel, (name, found) in zip(panels, samplers.items()):
        image = _plane(panel, values["own"], found, steps)
        panel.set_title(f"{name}\nenergy distance {found['distance']:.4f}", fontsize=7)
        panel.set_xlabel(f"axis 1 ({100 * values['explained'][0]:.0f} %)")
    panels[0].set_ylabel(f"axis 2 ({100 * values['explained'][1]:.0f} %)")
    lower.colorbar(image, ax=list(panels), label="sampling step", shrink=0.9)
    lower.suptitle(
        f"main axes of the {values['space']}; dots: n={n['rows']} rows, grey: all trajectories; "
        f"as many rows at random are {chance[0]:.4f} to {chance[-1]:.4f} away",
        fontsize=7,
    )
    return figure


def _plane(axes: Any, own: Sequence[Sequence[Sequence[float]]], found: dict[str, Any], steps: int) -> Any:
    background = [point for step in own for point in step]
    axes.scatter(*zip(*background, strict=True), s=2, color="0.8", lw=0, rasterized=True)
    axes.grid(visible=False)
    chosen = [step + 1 for step in found["steps"]]
    return axes.scatter(*zip(*found["points"], strict=True), s=6, c=chosen, cmap="viridis", vmin=1, vmax=steps, lw=0)


def _scores(one: Measured) -> Any:
    values, run = one.values, one.record
    n = values["n"]
    figure = new_figure(PAGE, 2.7)
    left, right = figure.subplots(1, 2)
    features, losses = n["feature trajectories"], n["loss trajectories"]
    _twin(
        left, values, "density", "ndtc", f"density D: steps within r={values['threshold']:.3g}", "share of rows, NDTC"
    )
    _twin(right, values, "variety", "loss", "variety V: summed cosine distance", f"loss of {run.method} (MSE of noise)")
    figure.suptitle(
        f"{run.task}, {run.method} {run.bits.name.upper()}, seed {run.seed}: scores of n={features} trajectories, "
        f"loss of n={losses}",
        fontsize=8,
    )
    return figure


def _twin(axes: Any, values: dict[str, Any], one: str, other: str, label: str, other_label: str) -> None:
    """Draw two curves over the steps, each on its own axis, with their correlation above."""
    steps = range(1, values["n"]["steps"] + 1)
    second = axes.twinx()
    second.grid(visible=False)
    axes.plot(steps, values["curves"][one], color=COLOURS[0], marker="o", ms=3)
    second.plot(steps, values["curves"][other], color=COLOURS[1], marker="s", ms=3, mfc="white", ls="--")
    step_axis(axes)
    axes.set_ylabel(label, color=COLOURS[0])
    second.set_ylabel(f"{other_label}, dashed", color=COLOURS[1])
    found = next(item for item in values["correlations"] if item["of"] == [one, other])
    if found["pearson"] is None:
        axes.set_title("no correlation: one curve is constant")
    else:
        axes.set_title(
            f"Pearson {found['pearson']:.2f}, Spearman {found['spearman']:.2f} over {values['n']['steps']} steps"
        )

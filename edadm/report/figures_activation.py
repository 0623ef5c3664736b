"""Figure 3: the range of the activations along the sampling trajectory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edadm.diagnostics.files import Diagnostic
from edadm.records import Record
from edadm.report.figures_pairs import Measured, first_of_each_task, groups, measured, spaced
from edadm.report.figures_style import COLOURS, PAGE, legend_below, new_figure, save, step_axis, styled

SHOWN = 6
NARROWEST = -3.0  # log2 of the smallest width that the colours tell apart


@styled
def fig3(records: Sequence[Record], diagnostics: Sequence[Diagnostic], folder: Path) -> list[Path]:
    """Draw the sites whose range moves most along t, and all sites in one map; one run of each task."""
    written = []
    for suffix, one in first_of_each_task(measured(records, diagnostics, "activation_range")).items():
        written += save(_sites(one), folder / f"fig3_activation_range{suffix}.png")
        written += save(_map(one), folder / f"fig3_activation_range_all{suffix}.png")
    return written


def most_moving(sites: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return the sites with the largest ratio of their widest to their narrowest step, one of each role and input."""
    moving = [site for site in sites if min(widths(site)) > 0]
    moving.sort(key=lambda site: -max(widths(site)) / min(widths(site)))
    distinct: list[dict[str, Any]] = []
    for site in moving:
        # to_q, to_k and to_v read the same tensor
        if all(site["role"] != other["role"] and site["max"] != other["max"] for other in distinct):
            distinct.append(site)
    return distinct[:count]


def widths(site: dict[str, Any]) -> list[float]:
    """Return maximum minus minimum of a site at every step."""
    return [high - low for low, high in zip(site["min"], site["max"], strict=True)]


def _sites(one: Measured) -> Any:
    values = one.values
    chosen = most_moving(values["sites"], SHOWN)
    figure = new_figure(PAGE, 1.75 * -(-len(chosen) // 2) + 0.7)
    grid = figure.subplots(-(-len(chosen) // 2), 2, squeeze=False)
    for axes, site in zip(grid.flat, chosen):
        _draw_site(axes, site, values["quantiles"])
    for axes in grid.flat[len(chosen) :]:
        axes.set_visible(False)
    for axes in grid.flat[: len(chosen)]:
        step_axis(axes, name=axes in grid[-1])
    for axes in grid[:, 0]:
        axes.set_ylabel("activation")
    if one.record.is_fp:
        legend_below(figure, grid.flat[0])
    else:
        name = f"static range, {one.record.method} {one.record.bits.name.upper()}"
        grid.flat[0].plot([], [], color=COLOURS[2], ls="--", lw=0.9, label=name)
        legend_below(figure, grid.flat[0])
    figure.suptitle(
        f"{one.record.task}, full-precision network, n={values['n']['trajectories']} trajectories\n"
        f"of each role the site whose range moves most, the first {len(chosen)} roles; {len(values['sites'])} sites",
        fontsize=8,
    )
    return figure


def _draw_site(axes: Any, site: dict[str, Any], quantiles: Sequence[float]) -> None:
    steps = range(1, len(site["min"]) + 1)
    curves = list(zip(*site["quantiles"], strict=True))
    lowest, low, middle, high, highest = curves
    percent = [f"{100 * q:g}" for q in quantiles]
    axes.fill_between(
        steps, lowest, highest, color=COLOURS[0], alpha=0.2, lw=0, label=f"{percent[0]} to {percent[-1]} %"
    )
    axes.fill_between(steps, low, high, color=COLOURS[0], alpha=0.4, lw=0, label=f"{percent[1]} to {percent[-2]} %")
    axes.plot(steps, middle, color=COLOURS[6], lw=0.8, label="median")
    axes.plot(steps, site["max"], color=COLOURS[1], label="max and min")
    axes.plot(steps, site["min"], color=COLOURS[1])
    if site["quantizer"]:
        for end in ("low", "high"):
            axes.axhline(site["quantizer"][end], color=COLOURS[2], ls="--", lw=0.9)
    axes.set_title(site["name"].replace(".act_quantizer", " input"), fontsize=7)


def _map(one: Measured) -> Any:
    """Return the width of every site at every step, as a share of its widest step."""
    sites, n = one.values["sites"], one.values["n"]
    shares = [
        [
            math.log2(max(width / max(widths(site)), 2**NARROWEST)) if max(widths(site)) > 0 else 0.0
            for width in widths(site)
        ]
        for site in sites
    ]
    figure = new_figure(PAGE, 4.6)
    axes = figure.subplots()
    steps = len(shares[0])
    image = axes.imshow(
        shares, aspect="auto", cmap="cividis", vmin=NARROWEST, vmax=0, extent=(0.5, steps + 0.5, len(sites), 0)
    )
    axes.grid(visible=False)
    starts = spaced(groups([site["unit"] for site in sites]), len(sites))
    axes.set_yticks([start for start, _ in starts], [name for _, name in starts])
    step_axis(axes)
    axes.set_ylabel(f"{len(sites)} sites in execution order")
    bar = figure.colorbar(image, ax=axes, label="width of the range / width at the site's widest step")
    ticks = [0, -1, -2, -3]
    bar.set_ticks(ticks, labels=["1", "1/2", "1/4", "1/8 or less"])
    axes.set_title(f"{one.record.task}, full-precision network, n={n['trajectories']} trajectories")
    return figure

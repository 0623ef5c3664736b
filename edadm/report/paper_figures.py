"""Figures 7 to 10: sample grids, and the influence of both lambdas."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edadm.diagnostics.files import Diagnostic
from edadm.errors import EdadmError
from edadm.records import Record
from edadm.report.experiment_file import SCALES, load
from edadm.report.figures_style import COLOURS, COLUMN, PAGE, new_figure, save, styled
from edadm.report.labels import base_label
from edadm.report.paper_rows import find_rows

LAMBDAS = {"tdac": "$\\lambda$ of TDAC", "fbr": "$\\lambda$ of FBR"}
PAIRED = {
    "sqnr": "SQNR of the noise\nprediction (dB) ↑",
    "psnr": "PSNR to FP (dB) ↑",
    "fd_tiny_to_fp": "fd_tiny to FP\n(proxy) ↓",
}
GRID = "grid"  # among the outputs of a record


@styled
def fig10(records: Sequence[Record], diagnostics: Sequence[Diagnostic], folder: Path) -> list[Path]:
    """Draw metrics against each lambda with the other one at its default; bars are intervals of single seeds.

    FID where the records have it, as in the paper, and the paired metrics of the embedded task.
    """
    points = _points(records)
    names = {"fid": "FID ↓"} | PAIRED
    shown = [name for name in names if any(name in run.metrics for _, runs in points for run in runs)]
    if not shown:
        raise EdadmError(f"no run of fig10_hyperparameters has any of {', '.join(names)}")
    figure = new_figure(COLUMN, 0.6 + 1.15 * len(shown))
    panels = figure.subplots(len(shown), 2, sharex="col", sharey="row", squeeze=False)
    for line, name in zip(panels, shown, strict=True):
        for axes, symbol in zip(line, LAMBDAS, strict=True):
            _lambda_panel(axes, _line_of(points, symbol), name)
        counts = sorted({run.metrics[name]["n"] for _, runs in points for run in runs if name in run.metrics})
        line[0].set_ylabel(f"{names[name]}\nn={' / '.join(map(str, counts))}")
    for axes, label in zip(panels[-1], LAMBDAS.values(), strict=True):
        axes.set_xlabel(label)
    seeds = sorted({len(runs) for _, runs in points})
    first = points[0][1][0]
    many = f"{' / '.join(map(str, seeds))} seed{'s' if seeds[-1] > 1 else ''}"
    title = f"{first.task}, W{first.bits.weight}A{first.bits.act}, {many}; bars: intervals over images"
    figure.suptitle(title, fontsize=7)
    return save(figure, folder / "fig10_hyperparameters.png")


def _points(records: Sequence[Record]) -> list[tuple[Mapping[str, float], list[Record]]]:
    """Return the lambdas of each row of the experiment that has records of its seeds, and those."""
    for scale in SCALES:
        found, _ = find_rows(load("fig10_hyperparameters", scale), records)
        points = [(row.row.point, row.asked) for row in found if row.asked]
        if points:
            return points
    raise EdadmError("no run of fig10_hyperparameters has a record")


def _line_of(
    points: Sequence[tuple[Mapping[str, float], list[Record]]], symbol: str
) -> list[tuple[float, list[Record]]]:
    """Return the points along one lambda, those where the other one has its most frequent value."""
    other = next(name for name in LAMBDAS if name != symbol)
    usual = statistics.mode(point[other] for point, _ in points)
    return sorted(((point[symbol], runs) for point, runs in points if point[other] == usual), key=lambda one: one[0])


def _lambda_panel(axes: Any, line: Sequence[tuple[float, list[Record]]], name: str) -> None:
    measured = [(x, [run.metrics[name] for run in runs if name in run.metrics]) for x, runs in line]
    measured = [(x, metrics) for x, metrics in measured if metrics]
    means = [statistics.fmean(metric["value"] for metric in metrics) for _, metrics in measured]
    axes.plot([x for x, _ in measured], means, "o-", color=COLOURS[0])
    for x, metrics in measured:
        ends = [end for metric in metrics for end in (metric.get("interval") or [metric["value"]])]
        axes.plot([x, x], [min(ends), max(ends)], color=COLOURS[0], lw=0.9)


@styled
def samples(records: Sequence[Record], diagnostics: Sequence[Diagnostic], folder: Path, name: str) -> list[Path]:
    """Draw the sample grids of the runs below each other: full precision above each quantized run, equal noise.

    name: of the file, since figures of the paper share an embedded task.
    """
    from matplotlib.image import imread

    grids = [(record, Path(record.outputs[GRID])) for record in records if GRID in record.outputs]
    pictures = [(record, imread(path)) for record, path in grids if path.is_file()]
    if len(pictures) < len(grids) or not pictures:
        missing = ", ".join(f"{base_label(record)} seed {record.seed}" for record, path in grids if not path.is_file())
        raise EdadmError(
            f"no sample grid beside the record of {missing or 'any run'}: pictures are not committed; the command "
            "draws them from images in the cache, with reference=null it makes what the cache lacks"
        )
    heights = [PAGE * picture.shape[0] / picture.shape[1] for _, picture in pictures]
    figure = new_figure(PAGE, sum(heights) + 0.25 * len(heights))
    panels = figure.subplots(len(pictures), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (record, picture) in zip(panels, pictures, strict=True):
        axes.imshow(picture, interpolation="nearest")
        axes.set_axis_off()
        bits = "full precision" if record.is_fp else f"W{record.bits.weight}A{record.bits.act}"
        axes.set_title(f"{base_label(record)}, {bits}, {record.task}, seed {record.seed}", loc="left")
    return save(figure, folder / f"{name}.png")

"""Figures from records."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from edadm.diagnostics.files import Diagnostic
from edadm.errors import EdadmError
from edadm.records import Record
from edadm.report.figures_style import COLOURS, save
from edadm.report.labels import by_label

STEP_CURVE = "sqnr_per_step"
Curve = list[float]


def sqnr(records: Sequence[Record], diagnostics: Sequence[Diagnostic], folder: Path) -> list[Path]:
    """Draw the noise-prediction SQNR of every sampling step, in the form of a registered figure."""
    path = step_curves(records, folder / f"{STEP_CURVE}.png")
    return [path, path.with_suffix(".svg")]


def step_curves(records: Iterable[Record], path: Path, metric: str = STEP_CURVE) -> Path:
    """Draw a metric of every sampling step, one line a method, as a PNG with an SVG beside it; return the PNG's path.

    The line is the mean over seeds, the shade their lowest and highest value. Reads ``metrics[metric]``:
    ``{values, n, unit}`` or a list, in sampling order. Records without it (full precision, failed runs) are left out.
    Raises EdadmError when none has it.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    used = [record for record in records if record.status == "ok" and _values(record, metric)]
    if not used:
        raise EdadmError(f"no record has `{metric}`: run a sweep whose metrics name it")
    figure = Figure(figsize=(7.0, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for index, (label, runs) in enumerate(lines(used).items()):
        colour, style = COLOURS[index % len(COLOURS)], ("-", ":", "--", "-.")[index // len(COLOURS) % 4]
        _draw(axes, label, [_values(run, metric) for run in runs], colour, style)
    axes.set_xlabel("sampling step (1 = noise, last = image)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(_axis_label(used, metric))
    axes.set_title(", ".join(sorted({f"{run.task} ({run.profile})" for run in used})), fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return save(figure, path, dpi=120)[0]


def _values(record: Record, metric: str) -> Curve:
    result: Any = record.metrics.get(metric) or []
    values = result.get("values", result.get("value")) if isinstance(result, dict) else result
    return [float(value) for value in values] if isinstance(values, list) else []


def lines(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return the runs of every line of a figure by its label: method, bits, and task where there are several."""
    groups: dict[tuple[str, int, int], list[Record]] = defaultdict(list)
    for record in records:
        groups[record.task, -record.bits.weight, -record.bits.act].append(record)
    one_task = len({task for task, _, _ in groups}) == 1
    found = {}
    for (task, weight, act), runs in sorted(groups.items()):
        bits = f"W{-weight}A{-act}"
        for label, same in sorted(by_label(runs).items()):
            found[f"{label}, {bits}" if one_task else f"{label}, {bits}, {task}"] = same
    return found


def _draw(axes: Any, label: str, curves: list[Curve], color: str, style: str) -> None:
    """Draw one line; an infinite value (no error at all) leaves a gap."""
    if len({len(curve) for curve in curves}) > 1:
        raise EdadmError(f"{label}: the runs have {sorted(map(len, curves))} sampling steps and cannot share a line")
    by_step = [[value if math.isfinite(value) else math.nan for value in values] for values in zip(*curves)]
    steps = range(1, len(by_step) + 1)
    seeds = f"{len(curves)} seed{'s' if len(curves) > 1 else ''}"
    mean = [statistics.fmean(values) for values in by_step]
    axes.plot(steps, mean, style, color=color, label=f"{label} ({seeds})", linewidth=1.5)
    if len(curves) > 1:
        low, high = [min(values) for values in by_step], [max(values) for values in by_step]
        axes.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)


def _axis_label(records: list[Record], metric: str) -> str:
    results: list[Any] = [record.metrics[metric] for record in records]
    described = [result for result in results if isinstance(result, dict)]
    units = {str(result["unit"]) for result in described if result.get("unit")}
    counts = sorted({int(result["n"]) for result in described if result.get("n") is not None})
    unit = units.pop() if units else "dB" if metric == STEP_CURVE else None
    name = "noise-prediction SQNR" if metric == STEP_CURVE else metric
    n = f", n={' / '.join(map(str, counts))}" if counts else ""
    return f"{name} ({unit}){n}" if unit else f"{name}{n}"

"""The tables of an experiment beside the paper, as sheets and as lines for CSV."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from edadm.comparison import Difference, versions_note
from edadm.records import Record
from edadm.report.claims import load as load_claims
from edadm.report.experiment_file import SCALES, Experiment, Row
from edadm.report.paper import COSTS, FRIENDLY
from edadm.report.paper_rows import Found
from edadm.report.paper_verdicts import NONE, UNDECIDED, Compared, Effect, Metric, values_of
from edadm.report.sheet import Line, Note, Sheet
from edadm.report.table import COMPARE, FEW_IMAGES

MOST_LABELS = 4  # under a table, for one remark
_UNITS = {
    "ModelSize_MB": "ModelSize (MB)",
    "Bops_G": "Bops (G)",
    "Speedup_x": "Speedup (x)",
    "Hardware_x": "Hardware (x)",
}


def row_label(experiment: Experiment, row: Row) -> str:
    """Return what the paper calls a row, with its task where the table has several, less what the tasks share."""
    if not row.paper:
        return NONE
    tasks = {other.paper["task"] for other in experiment.rows if "task" in other.paper}
    name = " ".join(row.paper[column] for column in ("method", "bits") if column in row.paper)
    if len(tasks) < 2:
        return name
    columns = zip(*(task.split() for task in tasks), strict=False)
    shared = sum(1 for _ in takewhile(lambda words: len(set(words)) == 1, columns))
    return f"{' '.join(row.paper['task'].split()[shared:])}: {name}"


def run_label(experiment: Experiment, row: Row) -> str:
    """Return the words that tell a row from the others: names alone, numbers with their key."""
    wanted = experiment.distinguishing | ({"method"} if row.is_fp else set())
    words = {key: value for key, value in row.run.items() if key in wanted} or row.run
    return " ".join(f"{key}={value}" if "." in key else value for key, value in words.items())


def number(value: float, spread: float | None = None) -> str:
    """Return a number with four significant digits, and its spread with as many decimals."""
    decimals = min(6, max(0, 3 - math.floor(math.log10(abs(value))))) if value else 0
    return f"{value:.{decimals}f}" + ("" if spread is None else f" ± {spread:.{decimals}f}")


def over_seeds(values: Sequence[float]) -> str:
    """Return mean and standard deviation of the values of some seeds."""
    if not values:
        return ""
    return number(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def effect_text(effect: Effect | None) -> str:
    """Return an effect with its interval, if it has one."""
    if not isinstance(effect, Difference):
        return "" if effect is None else f"{effect:+.3g}"
    low, high = effect.interval
    return f"{effect.value:+.3g} [{low:+.3g}, {high:+.3g}]"


def sheets(experiment: Experiment, metrics: Sequence[Metric], dropped: Sequence[Record]) -> list[Sheet]:
    """Return one table for each metric; what is missing stands under the first.

    At scale=tiny the nearness to full precision follows: the paper has no such numbers, and they are the sharpest ours.
    """
    found = [_sheet(experiment, metric) for metric in metrics]
    rows = [row.found for row in metrics[0].rows]
    found[0] = dataclasses.replace(found[0], notes=(*found[0].notes, *gaps(experiment, rows), *left_out(dropped)))
    near = _nearness(experiment, rows) if experiment.scale == SCALES[0] else None
    return found if near is None else [*found, near]


def _sheet(experiment: Experiment, metric: Metric) -> Sheet:
    effects = ("effect in paper", "effect here") if experiment.scale == SCALES[0] else ("difference",)
    middle = () if metric.name == FRIENDLY else effects
    ours = "computed" if metric.name == FRIENDLY else "ours" if metric.own in (None, *COSTS) else str(metric.own)
    return Sheet(
        heading=f"{experiment.source}: {experiment.title}, {_UNITS.get(metric.name, metric.name)}",
        subtitle=_subtitle(experiment, metric),
        header=("row of the paper", "run", "paper", ours, *middle, "seeds", "verdict"),
        lines=tuple(_line(experiment, row, len(middle)) for row in metric.rows),
        notes=tuple(Note(text) for text in _notes(experiment, metric)),
    )


def _subtitle(experiment: Experiment, metric: Metric) -> str:
    what = subject(experiment)
    if experiment.scale != SCALES[0]:
        return f"{what}."
    proxy = "" if metric.own in (None, FRIENDLY, *COSTS) else f", {metric.own} for {metric.name}"
    return f"{what} in place of the paper's{proxy}: judged is the direction of an effect, never a level."


def subject(experiment: Experiment) -> str:
    """Return the tasks of an experiment and the words that all of its rows share."""
    return " ".join([", ".join(experiment.tasks), *experiment.shared_words])


def _line(experiment: Experiment, row: Compared, middle: int) -> Line:
    own = row.own_text if row.mean is None else number(row.mean, row.std)
    if middle == 2:
        printed = "" if row.printed_effect is None else f"{row.printed_effect:+.3g}"
        between: tuple[str, ...] = (printed, effect_text(row.effect))
    else:
        between = (_difference(row),)[:middle]
    runs, wanted = row.found.runs, row.found.row
    return Line(
        cells=(
            row_label(experiment, wanted),
            run_label(experiment, wanted),
            NONE if row.printed is None else row.printed.value,
            own,
            *between,
            "" if wanted.is_fp else f"{len(runs)} of {max(len(runs), len(wanted.seeds))}",
            row.verdict,
        ),
        kind="fp" if wanted.is_fp else "",
        title=" ".join(record.hash for record in runs.values()),
    )


def _difference(row: Compared) -> str:
    if row.printed is None or not row.printed.number or row.mean is None:
        return ""
    change = row.mean - row.printed.number
    return f"{change:+.3g} ({100 * change / row.printed.number:+.1f} %)"


def _notes(experiment: Experiment, metric: Metric) -> list[str]:
    notes = []
    if any(row.std is not None for row in metric.rows):
        notes.append("a ± b: mean and standard deviation over seeds.")
    if any(isinstance(row.effect, Difference) for row in metric.rows):
        reference = " ".join(experiment.reference.values())
        notes.append(f"Effects are differences to the row `{reference}`; [a, b]: 95 %, see docs/statistics.md.")
    elif any(row.verdict.startswith(f"{UNDECIDED}: no interval") for row in metric.rows):
        notes.append(f"Effects get their interval from `{COMPARE}`, where the images are still in the cache.")
    counts = sorted({row.n for row in metric.rows if row.n is not None})
    if counts:
        few = f": under {FEW_IMAGES:,}, not comparable with published FID" if counts[0] < FEW_IMAGES else ""
        notes.append(f"n={' / '.join(map(str, counts))} images{few}.")
    return notes + _doubts(experiment, metric)


def _doubts(experiment: Experiment, metric: Metric) -> list[str]:
    """Return what is doubtful about the printed cells, each doubt once with its rows."""
    printed = [row for row in metric.rows if row.printed is not None]
    doubts: dict[str, list[str]] = defaultdict(list)
    for row in printed:
        for doubt in filter(None, row.printed.note.split("; ") if row.printed else ()):
            doubts[doubt].append(row_label(experiment, row.found.row))
    notes = []
    for doubt, rows in doubts.items():
        labels = list(dict.fromkeys(rows))
        where = ", ".join(labels) if len(labels) <= MOST_LABELS else f"{len(rows)} rows"
        where = "" if len(rows) == len(printed) else f" ({where})"
        notes.append(f"Printed numbers: {doubt}{where}.")
    return notes


def gaps(experiment: Experiment, rows: Sequence[Found]) -> list[Note]:
    """Return the commands that fill the gaps of an experiment: one for all where nothing has run."""
    able = [found for found in rows if not found.absent]
    remarks = [*_ended(experiment, able), *_older(rows)]
    if able and not any(found.runs or found.failed for found in able if not found.row.is_fp):
        return [Note("Nothing has run yet", experiment.whole_command), *remarks]
    missing = [found for found in able if found.missing_seeds]
    notes = {}
    for found in missing:
        seeds = "" if found.row.is_fp else f", seed {', '.join(map(str, found.missing_seeds))}"
        command = experiment.command(found.row, () if found.row.is_fp else found.missing_seeds)
        notes[command] = Note(f"Not run: {run_label(experiment, found.row)}{seeds}", command)
    return [*remarks, *notes.values()]


def _ended(experiment: Experiment, rows: Sequence[Found]) -> list[Note]:
    """Return how runs without a result ended; what diverged does so again, what failed may not."""
    notes = {}
    for found in rows:
        for record in found.failed:
            seed = "" if found.row.is_fp else f", seed {record.seed}"
            reason = str(record.reason).splitlines()[0]
            text = f"{record.status.capitalize()}: {run_label(experiment, found.row)}{seed}: {reason}"
            command = experiment.command(found.row, () if found.row.is_fp else (record.seed,))
            notes[text] = Note(text, command if record.status == "failed" else "")
    return list(notes.values())


def _older(rows: Sequence[Found]) -> list[Note]:
    left: dict[str, set[str]] = defaultdict(set)
    for name, hash in (pair for found in rows for pair in found.older):
        left[name].add(hash)
    return [Note(f"{text}.") for text in versions_note(dict(sorted(left.items())))]


def left_out(dropped: Sequence[Record]) -> list[Note]:
    """Return a note on the records that were measured otherwise than the newest one."""
    if not dropped:
        return []
    names = ", ".join(sorted(record.hash[:8] for record in dropped))
    otherwise = "with another checkpoint or other references, or on another device, than the newest record"
    return [Note(f"Left out, measured {otherwise}: {names}.")]


def _nearness(experiment: Experiment, rows: Sequence[Found]) -> Sheet | None:
    done = {run_label(experiment, found.row): found for found in rows if found.runs and not found.row.is_fp}
    measured = {name for found in done.values() for record in found.runs.values() for name in record.metrics}
    shown = [name for name in load_claims().fidelity if name in measured]
    if not shown:
        return None
    return Sheet(
        heading=f"{experiment.source}: {experiment.title}, nearness to full precision on the same noise",
        subtitle="Not in the paper. fd_tiny_to_fp: lower is nearer; sqnr and psnr (dB), ssim: higher is nearer.",
        header=("run", *shown, "seeds"),
        lines=tuple(
            Line((label, *(over_seeds(values_of(found.runs.values(), name)) for name in shown), str(len(found.runs))))
            for label, found in done.items()
        ),
    )


def lines(experiment: Experiment, metrics: Sequence[Metric]) -> list[dict[str, Any]]:
    """Return one mapping for each row and metric, for CSV."""
    return [_csv_line(experiment, metric, row) for metric in metrics for row in metric.rows]


def _csv_line(experiment: Experiment, metric: Metric, row: Compared) -> dict[str, Any]:
    found, wanted = row.found, row.found.row
    low, high = row.effect.interval if isinstance(row.effect, Difference) else (None, None)
    missing = bool(found.missing_seeds) and not found.absent
    return {
        "experiment": experiment.name,
        "scale": experiment.scale,
        "row": row_label(experiment, wanted),
        "run": " ".join(f"{key}={value}" for key, value in wanted.words.items()),
        "metric": metric.name,
        "own_metric": metric.own,
        "paper": row.printed.value if row.printed else None,
        "mean": row.own_text or row.mean,
        "std": row.std,
        "n": None if row.n is None else str(row.n),
        "seeds": " ".join(map(str, found.runs)),
        "effect_in_paper": row.printed_effect,
        "effect": row.effect.value if isinstance(row.effect, Difference) else row.effect,
        "effect_low": low,
        "effect_high": high,
        "verdict": row.verdict,
        "command": experiment.command(wanted, found.missing_seeds if not wanted.is_fp else ()) if missing else None,
        "note": row.printed.note if row.printed else None,
        "records": " ".join(record.hash for record in found.runs.values()),
    }

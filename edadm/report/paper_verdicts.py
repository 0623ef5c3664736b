"""An experiment beside the printed numbers: every row in every printed metric, with a verdict.

At scale=paper the level is judged: reproduced or differs. At scale=tiny ours is a proxy on another task, so only the
direction of an effect is: the difference of a row to the reference row of its experiment.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from edadm.comparison import FEW_SEEDS, Difference, Draws, difference
from edadm.records import Record
from edadm.report import paper
from edadm.report.experiment_file import FP, NOT_YET, SCALES, Experiment
from edadm.report.paper import COSTS, FRIENDLY, Cell
from edadm.report.paper_rows import Found

TOLERANCE = 0.05  # relative, of a printed distance, which has no spread
WITH_TOLERANCE = ("fid", "sfid")
REPRODUCED, DIFFERS, NOT_RUN = "reproduced", "differs", "not run"
SAME_DIRECTION, OPPOSITE, UNDECIDED = "same direction", "opposite direction", "undecided"
REFERENCE, NOT_MEASURED, NONE = "reference row", "not measured", "–"
Effect = Difference | float
"""The difference of two rows: with its interval where images were resampled, a number for costs, which are exact."""


@dataclass(frozen=True)
class Compared:
    """One row in one metric: the printed cell, our value over seeds, and both effects against the reference row.

    mean, std: over seeds, in the units of the records' metric. n: images behind each value. own_text: instead of a
    number, for a label.
    """

    found: Found
    printed: Cell | None
    verdict: str
    mean: float | None = None
    std: float | None = None
    n: int | None = None
    own_text: str = ""
    printed_effect: float | None = None
    effect: Effect | None = None


@dataclass(frozen=True)
class Metric:
    """One printed metric, the metric of our records that stands for it (None: no record has one), and its rows."""

    name: str
    own: str | None
    rows: tuple[Compared, ...]


def compare(experiment: Experiment, rows: Sequence[Found], draws: Mapping[str, Draws]) -> list[Metric]:
    """Return the rows of an experiment in every metric of its printed table, the label of friendliness last."""
    cells = paper.read(experiment.table) if experiment.table else []
    names = sorted(dict.fromkeys(cell.metric for cell in cells), key=lambda name: name == FRIENDLY)
    return [_metric(experiment, name, rows, cells, draws) for name in names]


def _metric(
    experiment: Experiment, name: str, rows: Sequence[Found], cells: Sequence[Cell], draws: Mapping[str, Draws]
) -> Metric:
    own = paper.stand_in(name, [record for found in rows for record in found.runs.values()])
    printed = [paper.line_of(cells, found.row.paper).get(name) if found.row.paper else None for found in rows]
    place = {id(found.row): index for index, found in enumerate(rows)}
    compared = []
    for found, cell in zip(rows, printed, strict=True):
        if name == FRIENDLY:
            compared.append(_friendly(found, cell))
            continue
        reference = experiment.reference_of(found.row)
        against = None if reference is None else place[id(reference)]
        one = _valued(found, cell, own)
        if experiment.scale != SCALES[0]:
            verdict = level_verdict(one, own, _printed_fp(cells, cell), _to_fp(found, rows, own, draws))
            compared.append(replace(one, verdict=one.verdict or verdict))
        elif against is None:
            compared.append(replace(one, verdict=one.verdict or NONE))
        else:
            compared.append(_with_effect(one, rows[against], printed[against], own, draws))
    return Metric(name, own, tuple(map(_with_lost_seeds, compared)))


def _with_lost_seeds(one: Compared) -> Compared:
    """Return a row whose verdict says how many seeds have no result: those that are left may be the lucky ones."""
    lost = one.found.lost if one.found.runs else ""
    return replace(one, verdict=f"{one.verdict} ({lost})") if lost else one


def _valued(found: Found, cell: Cell | None, own: str | None) -> Compared:
    """Return a row with its value, or with the verdict that it has none."""
    values = [] if own is None else values_of(found.runs.values(), own)
    if own is None or not values:
        return Compared(found, cell, _absence(found))
    std = statistics.stdev(values) if len(values) > 1 and not found.row.is_fp else None
    counts = {record.metrics[own].get("n") for record in found.runs.values() if own in record.metrics}
    return Compared(found, cell, "", statistics.fmean(values), std, counts.pop() if len(counts) == 1 else None)


def values_of(records: Iterable[Record], metric: str) -> list[float]:
    """Return the finite values of a metric or cost over some records."""
    values = [paper.value_of(record, metric) for record in records]
    return [value for value in values if value is not None and math.isfinite(value)]


def _absence(found: Found) -> str:
    """Return why a row has no number."""
    if found.absent:
        return f"{NOT_YET}: {', '.join(found.absent)}"
    if found.runs:
        return NOT_MEASURED
    if found.failed:
        last = found.failed[-1]
        return f"{last.status}: {str(last.reason).splitlines()[0]}"
    return NOT_RUN


def _friendly(found: Found, cell: Cell | None) -> Compared:
    if not found.runs or found.row.is_fp:
        return Compared(found, cell, NONE if found.row.is_fp else _absence(found))
    own = "yes" if all(map(paper.is_friendly, found.runs.values())) else "no"
    verdict = NONE if cell is None else "same label" if own == cell.value else DIFFERS
    return Compared(found, cell, verdict, own_text=own)


def _with_effect(
    one: Compared, against: Found, printed_against: Cell | None, own: str | None, draws: Mapping[str, Draws]
) -> Compared:
    """Return a row with its effects against the reference row, and what they say together."""
    if against.row.run == one.found.row.run:
        return replace(one, verdict=one.verdict or REFERENCE)
    printed = _printed_difference(one.printed, printed_against)
    effect = None if own is None or one.mean is None else _effect(one.found, against, own, draws)
    verdict = one.verdict or direction_verdict(printed, effect, bool(against.runs))
    return replace(one, printed_effect=printed, effect=effect, verdict=verdict)


def _printed_difference(one: Cell | None, other: Cell | None) -> float | None:
    if one is None or other is None or one.number is None or other.number is None:
        return None
    return one.number - other.number


def _effect(found: Found, against: Found, own: str, draws: Mapping[str, Draws]) -> Effect | None:
    if own not in COSTS:
        return difference(found.runs, against.runs, own, draws)
    one, other = values_of(found.runs.values(), own), values_of(against.runs.values(), own)
    return statistics.fmean(one) - statistics.fmean(other) if other else None


def direction_verdict(printed: float | None, effect: Effect | None, has_reference: bool) -> str:
    """Return whether our effect has the sign of the printed one.

    Our sign counts where the interval excludes zero and three seeds support it (`Difference.finding`).
    """
    if printed is None or not has_reference:
        return NONE
    if effect is None:
        return f"{UNDECIDED}: no interval"
    if isinstance(effect, float):
        return SAME_DIRECTION if _sign(effect) == _sign(printed) else OPPOSITE
    if not effect.finding or not printed:
        return f"{UNDECIDED} at n={effect.n}, {len(effect.seeds)} seed{'s' if len(effect.seeds) > 1 else ''}"
    return SAME_DIRECTION if effect.finding == _sign(printed) else OPPOSITE


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def level_verdict(one: Compared, own: str | None, printed_fp: Cell | None, to_fp: Difference | None = None) -> str:
    """Return whether a printed number is reproduced, at equal numbers of images.

    A distance (FID, sFID) is where ours is within 5 % of it, since the paper gives no spread; any metric is where the
    printed difference to full precision lies in our paired interval of that difference, over images and at least
    ``FEW_SEEDS`` seeds; a cost, which has no error, is where it rounds to the printed digits. to_fp: our difference by
    the draws, None where the runs were not resampled.
    """
    cell = one.printed
    if cell is None or cell.number is None or one.mean is None or own is None:
        return NONE
    if own in COSTS:
        return REPRODUCED if _rounds_to(one.mean, cell.value) else DIFFERS
    if cell.images is not None and one.n != cell.images:
        return f"{UNDECIDED} at n={one.n}: printed for n={cell.images}"
    if own in WITH_TOLERANCE and abs(one.mean - cell.number) <= TOLERANCE * abs(cell.number):
        return REPRODUCED
    printed = _printed_difference(cell, printed_fp)
    if printed is None:
        return DIFFERS if own in WITH_TOLERANCE else f"{UNDECIDED}: no printed difference to FP"
    if to_fp is None:
        return f"{UNDECIDED}: no interval of the difference to FP"
    if len(to_fp.seeds) < FEW_SEEDS:
        return f"{UNDECIDED}: needs {FEW_SEEDS} seeds"
    low, high = to_fp.interval
    return REPRODUCED if low <= printed <= high else DIFFERS


def _rounds_to(value: float, printed: str) -> bool:
    decimals = len(printed.partition(".")[2])
    return abs(value - float(printed)) <= 0.5 * 10**-decimals + 1e-9


def _to_fp(found: Found, rows: Sequence[Found], own: str | None, draws: Mapping[str, Draws]) -> Difference | None:
    """Return the paired difference of a row to the full-precision row of its task and sampler, by the draws."""
    words = {**found.row.words, "method": FP}
    for other in rows:
        if own is not None and other.row.is_fp and other.runs and other.row.words.items() <= words.items():
            fp = next(iter(other.runs.values()))
            return difference(found.runs, dict.fromkeys(found.runs, fp), own, draws)
    return None


def _printed_fp(cells: Iterable[Cell], cell: Cell | None) -> Cell | None:
    """Return the full-precision cell of a printed cell's task and metric."""
    if cell is None or cell.method == "FP":
        return None
    wanted = ("FP", cell.task, cell.metric)
    return next((other for other in cells if (other.method, other.task, other.metric) == wanted), None)

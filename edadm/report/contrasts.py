"""What tells the rows of a table apart: their paired differences, and the row that is better than all others."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edadm.comparison import Difference, Draws, difference
from edadm.records import Record

REFERENCE, FULL_PRECISION = "edadm", "FP"  # labels of the rows with which the others are compared
Runs = Mapping[int, Record]
"""The runs of one row by seed."""


@dataclass(frozen=True)
class Contrast:
    """The paired differences of the rows of a table to the row ``to``, one for each metric, None where not known."""

    to: str
    rows: tuple[tuple[str, tuple[Difference | None, ...]], ...]


def contrasts_of(
    rows: Mapping[str, Runs],
    full_precision: Runs,
    metrics: Sequence[str],
    draws: Mapping[str, Draws],
    reference: str = REFERENCE,
) -> tuple[Contrast, ...]:
    """Return the differences of every row to the reference and to full precision, as far as they are known.

    rows: the quantized runs by label.
    """
    found = []
    if reference in rows:
        sides = {label: (runs, rows[reference]) for label, runs in rows.items() if label != reference}
        found.append(_contrast(reference, sides, metrics, draws))
    if full_precision:
        fp = list(full_precision.values())[-1]  # its images depend on no seed
        found.append(
            _contrast(
                FULL_PRECISION, {label: (runs, dict.fromkeys(runs, fp)) for label, runs in rows.items()}, metrics, draws
            )
        )
    return tuple(contrast for contrast in found if contrast.rows)


def _contrast(
    to: str, rows: Mapping[str, tuple[Runs, Runs]], metrics: Sequence[str], draws: Mapping[str, Draws]
) -> Contrast:
    lines = [
        (label, tuple(difference(runs, others, metric, draws) for metric in metrics))
        for label, (runs, others) in sorted(rows.items())
    ]
    return Contrast(to, tuple((label, found) for label, found in lines if any(one is not None for one in found)))


def winner(
    rows: Mapping[str, Runs], metric: str, higher_is_better: bool | None, draws: Mapping[str, Draws]
) -> str | None:
    """Return the row that is found better than every other one (`Difference.finding`), None if there is none."""
    if higher_is_better is None or len(rows) < 2:
        return None
    sign = 1 if higher_is_better else -1
    best = max(rows, key=lambda label: sign * mean_of(rows[label], metric))
    found = [difference(rows[best], rows[label], metric, draws) for label in rows if label != best]
    return best if all(one is not None and one.finding == sign for one in found) else None


def mean_of(runs: Runs, metric: str) -> float:
    """Return the mean of a metric over the seeds that have it. Raises StatisticsError for none."""
    values = [record.metrics.get(metric, {}).get("value") for record in runs.values()]
    return statistics.fmean(value for value in values if value is not None)

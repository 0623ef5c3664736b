"""Tables from records: which runs share a table, a row and a cell, and what must be said under it.

A table holds runs that differ in the method only: same task, bits, scope, preset, profile, number of images, device
and protocol. A row is a method with its non-default slots, over seeds. Where the runs were resampled
(`edadm.compare`), the paired differences of the rows to EDA-DM and to full precision follow, and decide what is bold.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from edadm.comparison import FEW_SEEDS, RESAMPLED, Draws, newest_by_seed, newest_versions, versions_note
from edadm.records import Record, date, device_kind
from edadm.report.contrasts import FULL_PRECISION, REFERENCE, Contrast, contrasts_of, winner
from edadm.report.diff import flatten
from edadm.report.labels import apart, base_label, by_label, plain, sampling
from edadm.report.missing import Missing, command, fp_command, missing_seeds
from edadm.store import content_hash

FEW_IMAGES = 5000
BUSY = 0.2  # cores that others kept busy, from which on seconds are no measure of cost
COMPARE = "python -m edadm.compare"


@dataclass(frozen=True)
class Column:
    """One metric of a table; n is the number of images (or trajectories) behind its values if they all agree."""

    name: str
    higher_is_better: bool | None
    proxy: bool
    unit: str | None
    n: int | None

    @property
    def arrow(self) -> str:
        """Return the direction of better as an arrow, empty where there is none."""
        return {True: "↑", False: "↓", None: ""}[self.higher_is_better]


@dataclass(frozen=True)
class Cell:
    """One metric of one row over its seeds; ``text`` stands in where there is no value."""

    mean: float | None = None
    std: float | None = None  # over seeds, n - 1 in the denominator; None with a single seed
    interval: tuple[float, float] | None = None  # of a single seed, over images
    text: str = ""
    best: bool = False
    off_band: bool = False


@dataclass(frozen=True)
class Row:
    """One method over its seeds; seconds and MiB are those of quantization, other_load the cores others kept busy."""

    label: str
    is_fp: bool
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...] = ()
    tried: int = 0
    seconds: float | None = None
    peak_mib: float | None = None
    other_load: float | None = None
    hashes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Comparable runs; ``facts`` say what they share, ``missing`` which command fills a gap."""

    heading: str
    subtitle: str
    facts: dict[str, Any]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    missing: tuple[Missing, ...]
    protocol: dict[str, Any]
    contrasts: tuple[Contrast, ...] = ()


Group = tuple[Any, ...]


def tables(
    records: Iterable[Record], draws: Mapping[str, Draws] | None = None, reference: str = REFERENCE
) -> list[Table]:
    """Return one table for each group of comparable runs, sorted by what they share; full precision opens each.

    draws: of the runs, by hash; without them no row is compared with another. reference: the label of the row with
    which the others are compared besides full precision.
    """
    families: dict[Group, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda record: (record.hash, date(record))):
        families[family(record)].append(record)
    found = [table for key in sorted(families) for table in _family_tables(families[key], draws or {}, reference)]
    return _told_apart(found)


def _told_apart(tables: Sequence[Table]) -> list[Table]:
    """Return tables of which those with one heading say in what their sampling or device differs."""
    named: dict[tuple[str, str], list[Table]] = defaultdict(list)
    for table in tables:
        named[table.heading, table.subtitle].append(table)
    extras = {id(one): text for same in named.values() for one, text in zip(same, apart([t.facts for t in same]))}
    return [_with_extra(table, extras[id(table)]) for table in tables]


def _with_extra(table: Table, extra: str) -> Table:
    if not extra:
        return table
    if table.subtitle:  # of the demo, whose heading is a warning
        return replace(table, subtitle=f"{table.subtitle}, {extra}")
    return replace(table, heading=f"{table.heading}, {extra}")


def family(record: Record) -> Group:
    """Return what a full-precision row shares with every run it can be compared with."""
    return (record.task, record.n_images, record.precision, device_kind(record), content_hash(plain(record.protocol)))


def group(record: Record) -> Group:
    """Return what the runs of one table share beyond their family."""
    bits = record.bits
    return (record.profile, record.scope, record.preset, -bits.weight, -bits.act, -bits.softmax)


def _family_tables(family: list[Record], draws: Mapping[str, Draws], reference: str) -> list[Table]:
    full_precision = [record for record in family if record.is_fp]
    groups: dict[Group, list[Record]] = defaultdict(list)
    for record in family:
        if not record.is_fp:
            groups[group(record)].append(record)
    if not groups:
        return [_table(full_precision, full_precision, [], draws, reference)]
    found = []
    for key in sorted(groups):
        siblings = [record for other in groups if other[:3] == key[:3] for record in groups[other]]
        found.append(_table(groups[key], full_precision, siblings, draws, reference))
    return found


def _table(
    group: list[Record],
    full_precision: list[Record],
    siblings: list[Record],
    draws: Mapping[str, Draws],
    reference: str,
) -> Table:
    """Build one table from its runs, the FP runs, and the runs at all bit widths that are otherwise alike."""
    current, left = newest_versions(list({record.hash: record for record in [*full_precision, *group]}.values()))
    full_precision = [record for record in current if record.is_fp]
    group = [record for record in current if not record.is_fp] or full_precision
    first = group[0]
    quantized = [record for record in group if not record.is_fp]
    columns, notes = _columns([*full_precision, *quantized])
    notes += [f"{text}." for text in versions_note(left)]
    missing: list[Missing] = []
    rows = [_fp_row(first, full_precision, columns, notes, missing)]
    absent = {base_label(record) for record in siblings} - {base_label(record) for record in quantized}
    labelled: dict[str, list[Record]] = by_label(quantized) | {label: [] for label in absent}
    for label, runs in sorted(labelled.items()):
        rows.append(_row(label, runs, columns, notes))
        missing += _missing_metrics(label, runs, columns)
    missing += missing_seeds(labelled, siblings, first)
    demo = first.profile == "demo"
    contrasts: tuple[Contrast, ...] = ()
    if not demo:
        missing += _missing_draws([*full_precision, *quantized], draws)
        by_seed = {label: newest_by_seed(runs) for label, runs in labelled.items()}
        rows = _mark_best(rows, columns, by_seed, draws)
        names = [column.name for column in columns]
        contrasts = contrasts_of(by_seed, newest_by_seed(full_precision), names, draws, reference)
    if FULL_PRECISION not in {contrast.to for contrast in contrasts}:
        notes += _differences(labelled, columns)
    return Table(
        heading=f"demo profile, n={first.n_images}: too few for a verdict" if demo else _title(first),
        subtitle=_title(first) if demo else "",
        facts=_facts(first),
        columns=columns,
        rows=tuple(rows),
        notes=(*notes, *_general_notes(first, columns, rows, demo)),
        missing=tuple(missing),
        protocol=flatten(first.protocol) if first.protocol else {},
        contrasts=contrasts,
    )


def _title(record: Record) -> str:
    if record.is_fp:
        return f"{record.task}, full precision, n={record.n_images}"
    shared = f"scope {record.scope}, preset {record.preset}, profile {record.profile}, n={record.n_images}"
    return f"{record.task}, W{record.bits.weight}A{record.bits.act}, {shared}"


def _facts(record: Record) -> dict[str, Any]:
    bits = record.bits
    return {
        "task": record.task,
        "bits": "fp" if record.is_fp else f"W{bits.weight}A{bits.act}",
        "softmax": bits.softmax,
        "scope": record.scope,
        "preset": record.preset,
        "profile": record.profile,
        "n_images": record.n_images,
        "precision": record.precision,
        "device": device_kind(record),
        **sampling(record),
    }


def _columns(records: list[Record]) -> tuple[tuple[Column, ...], list[str]]:
    """Return the scalar metrics of some runs in the order the runs name them, and a note for each that no run has.

    A distance without a single value (the images are too few for it) takes no column beside metrics with one.
    """
    results: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        for name, result in record.metrics.items():
            if "values" not in result and not isinstance(result.get("value"), list):
                results[name].append(result)
    empty = {name for name, found in results.items() if all(_lacks_value(result) for result in found)}
    if len(empty) == len(results):
        empty = set()
    columns = tuple(_column(name, found) for name, found in results.items() if name not in empty)
    return columns, [f"{name} is n/a: {_reason(results[name])}" for name in results if name in empty]


def _lacks_value(result: Mapping[str, Any]) -> bool:
    return result.get("value") is None and result.get("kind") != "paired"


def _reason(results: list[Mapping[str, Any]]) -> str:
    return "; ".join(dict.fromkeys(str(result["reason"]) for result in results if result.get("reason")))


def _column(name: str, results: list[Mapping[str, Any]]) -> Column:
    def first(key: str) -> Any:
        return next((result[key] for result in results if result.get(key) is not None), None)

    counts = {result.get("n") for result in results if result.get("value") is not None}
    n = counts.pop() if len(counts) == 1 else None
    return Column(name, first("higher_is_better"), bool(first("proxy")), first("unit"), n)


def _fp_row(
    first: Record, runs: list[Record], columns: Sequence[Column], notes: list[str], missing: list[Missing]
) -> Row:
    """Return the full-precision row, flagged where it misses the band that the task expects."""
    if not runs:
        missing.append(Missing("the full-precision row", fp_command(first)))
        return replace(_row(FULL_PRECISION, [], columns, notes), is_fp=True)
    row = _row(FULL_PRECISION, runs, columns, notes)
    bands = {name: band for record in (first, *runs) for name, band in record.expected_band.items()}
    cells = list(row.cells)
    for index, column in enumerate(columns):
        band, mean = bands.get(column.name), cells[index].mean
        if band is not None and mean is not None and not band[0] <= mean <= band[1]:
            cells[index] = replace(cells[index], off_band=True)
            notes.append(
                f"(!) FP has {column.name} {mean:.4g}, outside of [{band[0]:.4g}, {band[1]:.4g}] that the task "
                "expects: explain this before trusting any row."
            )
    return replace(row, is_fp=True, cells=tuple(cells))


def _row(label: str, runs: list[Record], columns: Sequence[Column], notes: list[str]) -> Row:
    """Summarise the runs of one method over its seeds; of several records of a seed the newest counts."""
    if not runs:
        return Row(label, False, tuple(Cell(text="missing") for _ in columns))
    newest: dict[int, Record] = {}
    for record in sorted(runs, key=lambda record: (record.status == "ok", date(record), record.hash)):
        newest[record.seed] = record
    if dropped := sorted(record.hash[:8] for record in runs if record is not newest[record.seed]):
        notes.append(f"{label}: older records of the same seeds are left out: {', '.join(dropped)}.")
    used = [newest[seed] for seed in sorted(newest)]
    done = [record for record in used if record.status == "ok"]
    for record in used:
        if record.status != "ok":
            notes.append(f"{label}, seed {record.seed}: {record.status}: {record.reason}")
    load = _summary(max, [record.quantization_other_load for record in done])
    if load is not None and load > BUSY:
        notes.append(
            f"{label}: its seconds are no measure of cost: other work kept up to {load:.1f} cores busy meanwhile."
        )
    states = "/".join(sorted({record.status for record in used}))
    return Row(
        label=label,
        is_fp=False,
        cells=tuple(_cell(label, column.name, done, states, notes) for column in columns),
        seeds=tuple(record.seed for record in done),
        tried=len(used),
        seconds=_summary(statistics.fmean, [record.quantization_seconds for record in done]),
        peak_mib=_summary(max, [record.quantization_peak_mib for record in done]),
        other_load=load,
        hashes=tuple(record.hash for record in used),
    )


def _cell(label: str, metric: str, done: list[Record], states: str, notes: list[str]) -> Cell:
    if not done:
        return Cell(text=states)
    results = [record.metrics[metric] for record in done if metric in record.metrics]
    if done[0].is_fp and all(result.get("kind") == "paired" for result in results):
        return Cell(text="–")  # full precision is not compared with itself
    if not results:
        return Cell(text="missing")
    reasons = {str(r["reason"]): None for r in results if r.get("value") is None and r.get("reason")}
    notes += [f"{label}: {metric} is n/a: {reason}" for reason in reasons]
    values = [float(result["value"]) for result in results if result.get("value") is not None]
    if not values or any(math.isnan(value) for value in values):
        return Cell(text="n/a" if not values else "nan")
    if len(values) == 1:
        interval = next((r.get("interval") for r in results if r.get("value") is not None), None)
        return Cell(mean=values[0], interval=None if interval is None else (float(interval[0]), float(interval[1])))
    finite = all(math.isfinite(value) for value in values)
    return Cell(mean=statistics.fmean(values), std=statistics.stdev(values) if finite else None)


def _differences(rows: Mapping[str, list[Record]], columns: Sequence[Column]) -> list[str]:
    """Return a note for each metric whose results carry their paired difference to full precision."""
    notes = []
    for column in columns:
        texts = []
        for label, runs in sorted(rows.items()):
            found = [record.metrics.get(column.name, {}).get("difference_to_fp") for record in runs]
            if known := [difference for difference in found if difference is not None]:
                texts.append(f"{label} {_difference(known)}")
        if texts:
            what = f"{column.name} minus that of FP on the same noise (95 % by a paired bootstrap over images)"
            notes.append(f"{what}: {'; '.join(texts)}.")
    return notes


def _difference(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the difference of one seed with its interval, or of several with the widest reach of their intervals."""
    mean = statistics.fmean(difference["value"] for difference in found)
    low = min(difference["interval"][0] for difference in found)
    high = max(difference["interval"][1] for difference in found)
    seeds = f" (mean and outer bounds of {len(found)} seeds)" if len(found) > 1 else ""
    return f"{mean:+.4g} [{low:+.4g}, {high:+.4g}]{seeds}"


def _missing_metrics(label: str, runs: list[Record], columns: Sequence[Column]) -> list[Missing]:
    return [
        Missing(f"{label}, seed {record.seed}: {', '.join(absent)}", command(record))
        for record in runs
        if record.status == "ok" and (absent := [c.name for c in columns if c.name not in record.metrics])
    ]


def _missing_draws(records: Iterable[Record], draws: Mapping[str, Draws]) -> list[Missing]:
    """Return what must be resampled before the rows can be compared."""
    absent = {
        FULL_PRECISION if record.is_fp else base_label(record)
        for record in records
        if record.status == "ok" and record.hash not in draws and _can_be_resampled(record)
    }
    return [Missing(f"paired differences of {', '.join(sorted(absent))}", COMPARE)] if absent else []


def _can_be_resampled(record: Record) -> bool:
    return any(result.get("value") is not None for name, result in record.metrics.items() if name in RESAMPLED)


def _mark_best(
    rows: Sequence[Row],
    columns: Sequence[Column],
    runs: Mapping[str, Mapping[int, Record]],
    draws: Mapping[str, Draws],
) -> list[Row]:
    """Mark the quantized row that is found better than every other one in a metric, if there is one."""
    marked = [list(row.cells) for row in rows]
    for index, column in enumerate(columns):
        rivals = {row.label: runs[row.label] for row in rows if not row.is_fp and row.cells[index].mean is not None}
        best = winner(rivals, column.name, column.higher_is_better, draws)
        for row, cells in zip(rows, marked):
            cells[index] = replace(cells[index], best=row.label == best and not row.is_fp)
    return [replace(row, cells=tuple(cells)) for row, cells in zip(rows, marked)]


def _general_notes(first: Record, columns: Sequence[Column], rows: Sequence[Row], demo: bool) -> list[str]:
    notes = []
    if any(cell.best for row in rows for cell in row.cells):
        notes.append(
            f"Bold: better than every other quantized row, whose paired 95 % interval excludes zero with at least "
            f"{FEW_SEEDS} seeds (docs/statistics.md)."
        )
    if not demo and any(0 < len(row.seeds) < FEW_SEEDS for row in rows if not row.is_fp):
        notes.append(f"Rows with fewer than {FEW_SEEDS} seeds support no claim about a method.")
    if any(cell.std is not None for row in rows for cell in row.cells):
        notes.append("a ± b: mean and standard deviation over seeds.")
    if any(cell.interval is not None for row in rows for cell in row.cells):
        notes.append("a [b, c]: one seed with the interval of its metric over images.")
    if proxies := [column.name for column in columns if column.proxy]:
        notes.append(
            f"Proxies ({', '.join(proxies)}): distances of a small embedded feature network that rank the rows of this "
            "table; they are not FID, sFID or IS."
        )
    if first.n_images < FEW_IMAGES:
        notes.append(f"n={first.n_images} images: not comparable with published FID.")
    return notes


def _summary(function: Callable[[list[float]], float], values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return function(known) if known else None

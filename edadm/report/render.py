"""Tables as text: Markdown for the terminal, CSV, LaTeX, and one HTML file. The same records give the same bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edadm.comparison import Difference
from edadm.report import sheet
from edadm.report.contrasts import Contrast
from edadm.report.sheet import Line, Note, Sheet
from edadm.report.table import BUSY, FEW_IMAGES, Cell, Column, Row, Table

_DIGITS = 4


def markdown(tables: Sequence[Table]) -> str:
    """Return the tables as Markdown that reads well in a terminal too."""
    return sheet.markdown(sheets(tables))


def latex(tables: Sequence[Table]) -> str:
    """Return the tables as LaTeX (package booktabs) with their notes below."""
    return sheet.latex(sheets(tables))


def page(tables: Sequence[Table], title: str, pictures: Sequence[tuple[str, Path]] = ()) -> str:
    """Return one self-contained HTML page: the tables, and pictures (caption, PNG file) embedded in it."""
    return sheet.page(sheets(tables), title, pictures)


def sheets(tables: Sequence[Table]) -> list[Sheet]:
    """Return for each table its sheet and those of its paired differences."""
    return [one for table in tables for one in (_main(table), *differences(table))]


def _main(table: Table) -> Sheet:
    notes = [Note(text) for text in table.notes]
    notes += [Note(f"Missing: {gap.what}", gap.command) for gap in table.missing]
    notes += [Note(f"{title}: {text}") for title, text in _foot(table)]
    lines = tuple(_line(table, row) for row in table.rows)
    return Sheet(table.heading, tuple(_header(table)), lines, tuple(notes), table.subtitle)


def _line(table: Table, row: Row) -> Line:
    texts = _texts(table, row)
    bold = frozenset(index for index, (_, best) in enumerate(texts) if best)
    return Line(tuple(text for text, _ in texts), bold, "fp" if row.is_fp else "", " ".join(row.hashes))


def differences(table: Table) -> list[Sheet]:
    """Return a sheet for each row that the others are compared with: full precision and the table's own reference."""
    return [_contrast(table, contrast) for contrast in table.contrasts]


def _contrast(table: Table, contrast: Contrast) -> Sheet:
    shown = [
        index for index in range(len(table.columns)) if any(found[index] is not None for _, found in contrast.rows)
    ]
    header = ("method", *(_title(table, table.columns[index]) for index in shown), "seeds")
    decimals = {index: difference_decimals([found[index] for _, found in contrast.rows]) for index in shown}
    lines = []
    for label, found in contrast.rows:
        texts = [interval_text(found[index], decimals[index]) for index in shown]
        bold = frozenset(place + 1 for place, index in enumerate(shown) if (one := found[index]) and one.finding)
        seeds = sorted({len(one.seeds) for one in found if one is not None})
        lines.append(Line((label, *texts, " or ".join(map(str, seeds))), bold))
    notes = [
        "a [b, c]: mean over seeds of the paired difference on the same noise, and its 95 % interval over "
        "images and, from two seeds on, seeds (docs/statistics.md).",
        "Bold: the interval excludes zero, with at least 3 seeds.",
    ]
    if any(one.seed_deviation is None for _, found in contrast.rows for one in found if one is not None):
        notes.append("With one seed the interval covers images only, not another calibration and reconstruction.")
    heading = f"{table.heading}: minus {contrast.to}"
    return Sheet(heading, header, tuple(lines), tuple(map(Note, notes)), table.subtitle)


def interval_text(found: Difference | None, decimals: int) -> str:
    """Return a difference with its interval, all with their signs; a dash where there is none."""
    if found is None:
        return "–"
    low, high = found.interval
    return f"{found.value:+.{decimals}f} [{low:+.{decimals}f}, {high:+.{decimals}f}]"


def difference_decimals(found: Sequence[Difference | None]) -> int:
    """Return the decimals that give the narrowest interval two significant digits."""
    widths = [one.half_width for one in found if one is not None and one.half_width > 0]
    return min(6, max(0, 1 - math.floor(math.log10(min(widths))))) if widths else _DIGITS


def csv(tables: Sequence[Table]) -> str:
    """Return one line for each metric of each row, with everything that groups the tables; for pandas."""
    return sheet.csv(
        [
            _csv_line(table, row, column, cell)
            for table in tables
            for row in table.rows
            for column, cell in zip(table.columns, row.cells, strict=True)
        ]
    )


def _csv_line(table: Table, row: Row, column: Column, cell: Cell) -> dict[str, Any]:
    low, high = cell.interval or (None, None)
    values = {"mean": cell.mean, "std": cell.std, "low": low, "high": high}
    return (
        table.facts
        | {
            "method": row.label,
            "metric": column.name,
            "higher_is_better": column.higher_is_better,
            "proxy": column.proxy,
            "unit": column.unit,
            **values,
            "status": cell.text or "ok",
            "best": cell.best,
            "outside_expected_band": cell.off_band,
            "seeds": " ".join(map(str, row.seeds)),
            "n": column.n,
            "quantization_seconds": row.seconds,
            "quantization_peak_mib": row.peak_mib,
            "quantization_other_load": row.other_load,
            "comparable_with_published": table.facts["n_images"] >= FEW_IMAGES and not column.proxy,
            "protocol": "; ".join(f"{name}={value}" for name, value in table.protocol.items()),
            "records": " ".join(row.hashes),
        }
        | _csv_differences(table, row, column)
    )


def _csv_differences(table: Table, row: Row, column: Column) -> dict[str, Any]:
    """Return the paired differences of a cell, empty where there are none."""
    index = table.columns.index(column)
    values: dict[str, Any] = {}
    for contrast in table.contrasts:
        found = dict(contrast.rows).get(row.label, (None,) * len(table.columns))[index]
        low, high = (None, None) if found is None else found.interval
        name = f"minus_{contrast.to}"
        values |= {
            name: None if found is None else found.value,
            f"{name}_low": low,
            f"{name}_high": high,
            f"{name}_without_bias": None if found is None else found.value - found.bias,
            f"{name}_seeds": None if found is None else len(found.seeds),
        }
    return values


def _header(table: Table) -> list[str]:
    return ["method", *(_title(table, column) for column in table.columns), "seeds", "images", "quant. s", "peak MiB"]


def _title(table: Table, column: Column) -> str:
    n = f"n={column.n}" if column.n is not None and column.n != table.facts["n_images"] else None
    extra = ", ".join(text for text in (column.unit, "proxy" if column.proxy else None, n) if text)
    return " ".join(text for text in (column.name, column.arrow, f"({extra})" if extra else "") if text)


def _texts(table: Table, row: Row) -> list[tuple[str, bool]]:
    """Return the text of every cell of a row and whether it is marked best."""
    metrics = [(_cell_text(cell, _decimals(table, index)), cell.best) for index, cell in enumerate(row.cells)]
    complete = len(row.seeds) == row.tried
    seeds = "" if not row.tried else str(row.tried) if complete else f"{len(row.seeds)} of {row.tried}"
    images = str(table.facts["n_images"]) if row.tried else ""
    seconds = "" if row.seconds is None else f"{row.seconds:.1f}" if row.seconds < 100 else f"{row.seconds:.0f}"
    if row.other_load is not None and row.other_load > BUSY:
        seconds += " (busy)"
    peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
    return [(row.label, False), *metrics, *((text, False) for text in (seeds, images, seconds, peak))]


def _cell_text(cell: Cell, decimals: int) -> str:
    if cell.mean is None:
        return cell.text
    text = _number(cell.mean, decimals)
    if cell.std is not None:
        text += f" ± {_number(cell.std, decimals)}"
    if cell.interval is not None:
        text += f" [{_number(cell.interval[0], decimals)}, {_number(cell.interval[1], decimals)}]"
    return text + (" (!)" if cell.off_band else "")


def _number(value: float, decimals: int) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:.{decimals}f}"


def _decimals(table: Table, index: int) -> int:
    """Return the decimals that give the largest value of a column four significant digits."""
    values = [abs(cell.mean) for row in table.rows if (cell := row.cells[index]).mean is not None]
    largest = max((value for value in values if math.isfinite(value)), default=0.0)
    digits_before = math.floor(math.log10(largest)) + 1 if largest > 0 else 1
    return min(6, max(0, _DIGITS - digits_before))


def _foot(table: Table) -> list[tuple[str, str]]:
    """Return the protocol, the facts outside of the heading, and the records behind every row."""
    protocol = "; ".join(f"{name} {_short(value)}" for name, value in table.protocol.items())
    precision = f"precision {table.facts['precision']}"
    device = f"device {table.facts['device']}" if table.facts["device"] else ""
    softmax = "" if table.facts["bits"] == "fp" else f"softmax bits {table.facts['softmax']}"
    records = "; ".join(f"{row.label} {' '.join(hash[:8] for hash in row.hashes)}" for row in table.rows if row.hashes)
    return [
        ("Protocol", "; ".join(text for text in (protocol, precision, softmax, device) if text)),
        ("Records", records),
    ]


def _short(value: Any) -> str:
    """Return a value as text, a checksum cut to 12 digits (the record has all)."""
    text = str(value)
    return text[:12] + "…" if re.fullmatch(r"[0-9a-f]{32,}", text) else text

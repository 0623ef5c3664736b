"""Tables as text: Markdown for the terminal, CSV, LaTeX, and one HTML file. The same records give the same bytes."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edadm.report.diff import markdown_table
from edadm.report.table import FEW_IMAGES, Cell, Column, Row, Table

_DIGITS = 4
_LATEX = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "∞": r"$\infty$",
    "–": "--",
    "…": r"\ldots{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
} | {character: f"\\{character}" for character in "&%$#_{}"}
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 0.3rem; }
table { border-collapse: collapse; margin: 0.8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.8rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid #444; }
tr.fp td { background: #f4f4f4; }
.off { color: #b00020; }
.notes { color: #444; font-size: 0.9rem; }
code { background: #f4f4f4; padding: 0.1rem 0.3rem; }
img { max-width: 100%; margin-top: 1rem; }
"""


def markdown(tables: Sequence[Table]) -> str:
    """Return the tables as Markdown that reads well in a terminal too."""
    return "\n".join(_markdown(table) for table in tables)


def _markdown(table: Table) -> str:
    rows = [[_bold(text, best) for text, best in _texts(table, row)] for row in table.rows]
    lines = [f"## {table.heading}", ""]
    if table.subtitle:
        lines += [table.subtitle, ""]
    lines += [markdown_table(_header(table), rows)]
    lines += [f"- {note}" for note in table.notes]
    lines += [f"- Missing: {gap.what}: `{gap.command}`" for gap in table.missing]
    lines += [f"- {title}: {text}" for title, text in _foot(table)]
    return "\n".join(lines) + "\n"


def _bold(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def csv(tables: Sequence[Table]) -> str:
    """Return one line for each metric of each row, with everything that groups the tables; for pandas."""
    import pandas as pd

    lines = [
        _csv_line(table, row, column, cell)
        for table in tables
        for row in table.rows
        for column, cell in zip(table.columns, row.cells, strict=True)
    ]
    text: str = pd.DataFrame(lines).to_csv(index=False, lineterminator="\n")
    return text


def _csv_line(table: Table, row: Row, column: Column, cell: Cell) -> dict[str, Any]:
    low, high = cell.interval or (None, None)
    values = {"mean": cell.mean, "std": cell.std, "low": low, "high": high}
    return table.facts | {
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
        "comparable_with_published": table.facts["n_images"] >= FEW_IMAGES,
        "protocol": "; ".join(f"{name}={value}" for name, value in table.protocol.items()),
        "records": " ".join(row.hashes),
    }


def latex(tables: Sequence[Table]) -> str:
    """Return the tables as LaTeX (package booktabs) with their notes below."""
    return "\n".join(_latex(table) for table in tables)


def _latex(table: Table) -> str:
    header = [_tex(text) for text in _header(table)]
    rows = [[_tex_cell(text, best) for text, best in _texts(table, row)] for row in table.rows]
    notes = [*table.notes, *(f"Missing: {gap.what}: {gap.command}" for gap in table.missing)]
    notes += [f"{title}: {text}" for title, text in _foot(table)]
    caption = ". ".join(_tex(text) for text in (table.heading, table.subtitle) if text)
    body = [" & ".join(line) + r" \\" for line in rows]
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            " & ".join(header) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\par\footnotesize",
            *[_tex(note) + r"\\" for note in notes],
            r"\end{table}",
            "",
        ]
    )


def _tex_cell(text: str, best: bool) -> str:
    return rf"\textbf{{{_tex(text)}}}" if best else _tex(text)


def _tex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def page(tables: Sequence[Table], title: str, pictures: Sequence[tuple[str, Path]] = ()) -> str:
    """Return one self-contained HTML page: the tables, and pictures (caption, PNG file) embedded in it."""
    sections = [_section(table) for table in tables]
    images = [
        f'<h2>{html.escape(caption)}</h2>\n<img alt="{html.escape(caption)}" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for caption, path in pictures
    ]
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            *sections,
            *images,
            "</body></html>",
            "",
        ]
    )


def _section(table: Table) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in _header(table))
    rows = "\n".join(_html_row(table, row) for row in table.rows)
    notes = [html.escape(note) for note in table.notes]
    notes += [f"Missing: {html.escape(gap.what)}: <code>{html.escape(gap.command)}</code>" for gap in table.missing]
    notes += [f"{title}: {html.escape(text)}" for title, text in _foot(table)]
    items = "\n".join(f"<li>{note}</li>" for note in notes)
    subtitle = f"<p>{html.escape(table.subtitle)}</p>\n" if table.subtitle else ""
    return (
        f"<h2>{html.escape(table.heading)}</h2>\n{subtitle}<table><thead><tr>{head}</tr></thead>\n"
        f'<tbody>\n{rows}\n</tbody></table>\n<ul class="notes">\n{items}\n</ul>'
    )


def _html_row(table: Table, row: Row) -> str:
    kind = ' class="fp"' if row.is_fp else ""
    cells = "".join(_html_cell(text, best) for text, best in _texts(table, row))
    return f'<tr{kind} title="{" ".join(row.hashes)}">{cells}</tr>'


def _html_cell(text: str, best: bool) -> str:
    escaped = html.escape(text)
    off = ' class="off"' if text.endswith("(!)") else ""
    return f"<td{off}><strong>{escaped}</strong></td>" if best else f"<td{off}>{escaped}</td>"


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
    softmax = "" if table.facts["bits"] == "fp" else f"softmax bits {table.facts['softmax']}"
    records = "; ".join(f"{row.label} {' '.join(hash[:8] for hash in row.hashes)}" for row in table.rows if row.hashes)
    return [("Protocol", "; ".join(text for text in (protocol, precision, softmax) if text)), ("Records", records)]


def _short(value: Any) -> str:
    """Return a value as text, a checksum cut to 12 digits (the record has all)."""
    text = str(value)
    return text[:12] + "…" if re.fullmatch(r"[0-9a-f]{32,}", text) else text

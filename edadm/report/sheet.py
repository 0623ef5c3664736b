"""A table of texts, and how it is written as Markdown, CSV, LaTeX or HTML."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edadm.report.diff import markdown_table

_TEX = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "∞": r"$\infty$",
    "–": "--",
    "…": r"\ldots{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
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


@dataclass(frozen=True)
class Line:
    """One line of a sheet: its cells, which of them are bold, and for HTML a class and the text of its tooltip."""

    cells: tuple[str, ...]
    bold: frozenset[int] = frozenset()
    kind: str = ""
    title: str = ""


@dataclass(frozen=True)
class Note:
    """A remark under a sheet, and a command that belongs to it."""

    text: str
    command: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table with its heading and what must be said under it."""

    heading: str
    header: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[Note, ...] = ()
    subtitle: str = ""


def write(sheets: Sequence[Sheet], lines: Sequence[Mapping[str, Any]], style: str, title: str) -> str:
    """Return sheets in a style: markdown, latex or html; csv holds the named values of lines instead."""
    if style == "csv":
        return csv(lines)
    if style == "html":
        return page(sheets, title)
    return latex(sheets) if style == "latex" else markdown(sheets)


def markdown(sheets: Sequence[Sheet]) -> str:
    """Return sheets as Markdown that reads well in a terminal too."""
    return "\n".join(map(_markdown, sheets))


def _markdown(sheet: Sheet) -> str:
    parts = [f"## {sheet.heading}", ""]
    if sheet.subtitle:
        parts += [sheet.subtitle, ""]
    if sheet.lines:
        rows = [
            [f"**{text}**" if i in line.bold else text for i, text in enumerate(line.cells)] for line in sheet.lines
        ]
        parts.append(markdown_table(sheet.header, rows))
    parts += [f"- {note.text}: `{note.command}`" if note.command else f"- {note.text}" for note in sheet.notes]
    return "\n".join(parts) + "\n"


def csv(lines: Sequence[Mapping[str, Any]]) -> str:
    """Return lines of named values as CSV."""
    import pandas as pd

    text: str = pd.DataFrame(lines).to_csv(index=False, lineterminator="\n")
    return text


def latex(sheets: Sequence[Sheet]) -> str:
    """Return sheets as LaTeX tables (package booktabs) with their notes below."""
    return "\n".join(map(_latex, sheets))


def _latex(sheet: Sheet) -> str:
    notes = [f"{note.text}: {note.command}" if note.command else note.text for note in sheet.notes]
    caption = ". ".join(_tex(text) for text in (sheet.heading, sheet.subtitle) if text)
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            *(_tabular(sheet) if sheet.header else []),
            r"\par\footnotesize",
            *[_tex(note) + r"\\" for note in notes],
            r"\end{table}",
            "",
        ]
    )


def _tabular(sheet: Sheet) -> list[str]:
    rows = [
        " & ".join(rf"\textbf{{{_tex(text)}}}" if i in line.bold else _tex(text) for i, text in enumerate(line.cells))
        for line in sheet.lines
    ]
    return [
        rf"\begin{{tabular}}{{l{'r' * (len(sheet.header) - 1)}}}",
        r"\toprule",
        " & ".join(map(_tex, sheet.header)) + r" \\",
        r"\midrule",
        *[row + r" \\" for row in rows],
        r"\bottomrule",
        r"\end{tabular}",
    ]


def _tex(text: str) -> str:
    return "".join(_TEX.get(character, character) for character in text)


def page(sheets: Sequence[Sheet], title: str, pictures: Sequence[tuple[str, Path]] = ()) -> str:
    """Return one self-contained HTML page: the sheets, and pictures (caption, PNG file) embedded in it."""
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
            *map(_section, sheets),
            *images,
            "</body></html>",
            "",
        ]
    )


def _section(sheet: Sheet) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in sheet.header)
    rows = "\n".join(_html_line(line) for line in sheet.lines)
    items = "\n".join(f"<li>{_html_note(note)}</li>" for note in sheet.notes)
    subtitle = f"<p>{html.escape(sheet.subtitle)}</p>\n" if sheet.subtitle else ""
    return (
        f"<h2>{html.escape(sheet.heading)}</h2>\n{subtitle}<table><thead><tr>{head}</tr></thead>\n"
        f'<tbody>\n{rows}\n</tbody></table>\n<ul class="notes">\n{items}\n</ul>'
    )


def _html_line(line: Line) -> str:
    kind = f' class="{line.kind}"' if line.kind else ""
    cells = "".join(_html_cell(text, index in line.bold) for index, text in enumerate(line.cells))
    return f'<tr{kind} title="{html.escape(line.title)}">{cells}</tr>'


def _html_cell(text: str, bold: bool) -> str:
    escaped = html.escape(text)
    off = ' class="off"' if text.endswith("(!)") else ""
    return f"<td{off}><strong>{escaped}</strong></td>" if bold else f"<td{off}>{escaped}</td>"


def _html_note(note: Note) -> str:
    text = html.escape(note.text)
    return f"{text}: <code>{html.escape(note.command)}</code>" if note.command else text

"""In what two records differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edadm.errors import EdadmError
from edadm.records import Record, read, to_dict

ABSENT = "(absent)"


def flatten(obj: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dicts and lists by dotted name; entries of a list that have a name go by it."""
    if isinstance(obj, Mapping) and obj:
        items = [(str(name), value) for name, value in obj.items()]
    elif isinstance(obj, list | tuple) and obj and all(isinstance(entry, Mapping) and "name" in entry for entry in obj):
        items = [(f"{entry['name']}[{entry.get('kind', '')}]".removesuffix("[]"), entry) for entry in obj]
    else:
        return {prefix: obj}
    leaves: dict[str, Any] = {}
    for name, value in items:
        leaves |= flatten(value, f"{prefix}.{name}" if prefix else name)
    return leaves


def locate(name: str, records: Sequence[Record]) -> Record:
    """Return the record of a path or of a prefix of a hash. Raises EdadmError if there is none or more than one."""
    if Path(name).is_file():
        return read(Path(name))
    found = [record for record in records if record.hash.startswith(name)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise EdadmError(f"no record {name!r}: neither a file nor the beginning of one of {len(records)} record hashes")
    hashes = ", ".join(f"{record.hash} ({record.method})" for record in found)
    raise EdadmError(f"{name!r} begins {len(found)} hashes: {hashes}. Give more digits")


def differences(a: Record, b: Record) -> list[tuple[str, Any, Any]]:
    """Return (name, value in a, value in b) of every field that differs, in the order of the record's fields."""
    left, right = flatten(to_dict(a)), flatten(to_dict(b))
    names = list(left) + [name for name in right if name not in left]
    pairs = ((name, left.get(name, ABSENT), right.get(name, ABSENT)) for name in names)
    return [(name, one, other) for name, one, other in pairs if one != other]


def render_diff(a: Record, b: Record, width: int = 60) -> str:
    """Return the differences of two records as a Markdown table; long values are cut to width characters."""
    rows = [(name, _short(one, width), _short(other, width)) for name, one, other in differences(a, b)]
    if not rows:
        return f"{a.hash} and {b.hash} are equal.\n"
    return markdown_table(("field", a.hash[:8], b.hash[:8]), rows)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are aligned for a terminal; the first column is left-aligned."""
    lines = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (header, *rows)]
    widths = [max(3, *(len(line[index]) for line in lines)) for index in range(len(header))]
    ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def text(line: Sequence[str]) -> str:
        cells = [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
        return "| " + " | ".join(cells) + " |"

    return "\n".join([text(lines[0]), text(ruler), *map(text, lines[1:])]) + "\n"


def _short(value: Any, width: int) -> str:
    text = str(value)
    return text if len(text) <= width else text[: width - 1] + "…"

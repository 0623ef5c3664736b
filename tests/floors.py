"""Print the lowest versions that pyproject.toml allows, one requirement a line: what ``make test-floors`` installs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
FLOOR = re.compile(r"\s*([\w.-]+)[^;]*?>=\s*([\w.]+)")


def pins(*extras: str) -> list[str]:
    """Return ``name==floor`` of every requirement, and of those of some extras; a name given twice stands once."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    texts = project["dependencies"] + [text for extra in extras for text in project["optional-dependencies"][extra]]
    return list(dict.fromkeys("==".join(_floor(text)) for text in texts))


def _floor(text: str) -> tuple[str, str]:
    found = FLOOR.match(text)
    if found is None:
        raise ValueError(f"requirement {text!r} has no floor: give it one (>=)")
    return found[1], found[2]


if __name__ == "__main__":
    print("\n".join(pins("test")))

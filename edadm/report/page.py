"""Replace a generated block of a Markdown page, the text between ``<!-- name -->`` and ``<!-- /name -->``."""

from __future__ import annotations


def with_block(page: str, name: str, text: str) -> str:
    """Return the page with another text in a block; the text ends with a new line.

    Raises ValueError for a page without that block.
    """
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    before, begun, rest = page.partition(start)
    _, ended, after = rest.partition(end)
    if not begun or not ended:
        raise ValueError(f"the page has no block {start.strip()} ... {end.strip()}")
    return before + start + text + end + after

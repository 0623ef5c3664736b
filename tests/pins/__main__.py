"""Write the pins of new parts and of parts whose version was raised; refuse to move one whose version stands."""

from __future__ import annotations

import sys

from tests.pins.file import PATH, moved, read, write
from tests.pins.vectors import pins


def main() -> int:
    """Write the file and return the exit code."""
    old, found = read() if PATH.is_file() else {}, pins()
    complaints = [text for name, pin in found.items() if name in old and (text := moved(name, pin, old[name]))]
    if complaints:
        print("\n".join(complaints), file=sys.stderr)
        return 1
    write(
        {name: old[name] if name in old and old[name]["version"] == pin.version else pin for name, pin in found.items()}
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

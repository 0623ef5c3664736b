"""The committed pins, and the comparison with what the parts compute."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.pins.vectors import Pin

PATH = Path(__file__).with_name("pins.json")
DIGITS = 8
ABS = 1e-6  # of numbers around zero

Kept = Mapping[str, Any]
"""``version`` of a part and its ``values``."""


def read() -> dict[str, Kept]:
    """Return the committed pins by name."""
    found: dict[str, Kept] = json.loads(PATH.read_text(encoding="utf-8"))
    return found


def write(pins: Mapping[str, Pin | Kept]) -> None:
    """Write pins, computing those that are no kept ones, one a line."""
    lines = [f" {json.dumps(name)}: {json.dumps(_kept(pin))}" for name, pin in pins.items()]
    PATH.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def moved(name: str, pin: Pin, kept: Kept) -> str | None:
    """Say what to do about a part that gives other numbers under the version of its pin, None where it does not."""
    if pin.version != kept["version"]:
        return None
    values, expected = np.array([float(value) for value in pin.compute()]), np.array(kept["values"])
    if values.shape == expected.shape and np.allclose(values, expected, rtol=pin.rel, atol=ABS):
        return None
    far = ""
    if values.shape == expected.shape:
        worst = int(np.argmax(np.abs(values - expected)))
        far = f", number {worst} is {values[worst]:.6g} and was {expected[worst]:.6g}"
    return (
        f"{name} gives other numbers at version {pin.version}{far}: cached results of the old code would count as "
        f"results of the new. Mend it, or raise {pin.raises}, say in CHANGELOG.md what changed and why, and run "
        "`python -m tests.pins`."
    )


def _kept(pin: Pin | Kept) -> Kept:
    if not isinstance(pin, Pin):
        return pin
    return {"version": pin.version, "values": [float(f"{float(value):.{DIGITS}g}") for value in pin.compute()]}

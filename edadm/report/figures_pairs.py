"""Which diagnostics belong to which records, and how the units of a network are put on an axis."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from edadm.diagnostics.files import Diagnostic
from edadm.errors import EdadmError
from edadm.records import Record
from edadm.report.figures import lines


@dataclass(frozen=True)
class Measured:
    """A record and what one diagnostic measured of its run."""

    record: Record
    values: dict[str, Any]


def measured(records: Iterable[Record], diagnostics: Iterable[Diagnostic], name: str) -> list[Measured]:
    """Return the finished records that have a diagnostic, with its values. Raises EdadmError when none has it."""
    values = {found.run: found.values for found in diagnostics if found.name == name}
    pairs = [Measured(run, values[run.hash]) for run in records if run.status == "ok" and run.hash in values]
    if not pairs:
        raise EdadmError(f"no record has the diagnostic {name}: run it with `python run.py ... diagnostics=[{name}]`")
    return pairs


def by_line(pairs: Sequence[Measured]) -> dict[str, list[Measured]]:
    """Return the pairs by the label of their line: method, bits, and task where there are several."""
    values = {pair.record.hash: pair for pair in pairs}
    return {
        label: [values[run.hash] for run in runs]
        for label, runs in lines([pair.record for pair in values.values()]).items()
    }


def by_task(pairs: Sequence[Measured]) -> dict[str, list[Measured]]:
    """Return the pairs of each task under the suffix that its files get, empty where there is one task."""
    tasks = sorted({pair.record.task for pair in pairs})
    return {
        f"_{task}" if len(tasks) > 1 else "": [pair for pair in pairs if pair.record.task == task] for task in tasks
    }


def first_of_each_task(pairs: Sequence[Measured]) -> dict[str, Measured]:
    """Return one pair of each task under its suffix: smallest seed, then first label."""
    order = {pair.record.hash: label for label, found in by_line(pairs).items() for pair in found}
    return {
        suffix: min(found, key=lambda pair: (pair.record.seed, order[pair.record.hash]))
        for suffix, found in by_task(pairs).items()
    }


def groups(units: Sequence[str]) -> list[tuple[int, str]]:
    """Return where each part of the network begins among the names of its units, and what it is called.

    Units of one level (``down_blocks.1.resnets.0``) form a part; layers outside of levels are put together by their
    first name.
    """
    names = [
        ".".join(unit.split(".")[: 2 if unit.split(".")[1:2] and unit.split(".")[1].isdigit() else 1]) for unit in units
    ]
    return [(index, name) for index, name in enumerate(names) if not index or names[index - 1] != name]


def spaced(starts: Sequence[tuple[int, str]], total: int, least: float = 0.025) -> list[tuple[int, str]]:
    """Return the starts without those nearer to the one before than a share of the axis."""
    kept: list[tuple[int, str]] = []
    for start, name in starts:
        if not kept or start - kept[-1][0] >= least * total:
            kept.append((start, name))
    return kept


def counts(pairs: Iterable[Measured], what: str) -> str:
    """Return how many of something the runs measured, as ``n=128`` or ``n=64 / 128``."""
    return "n=" + " / ".join(map(str, sorted({pair.values["n"][what] for pair in pairs})))

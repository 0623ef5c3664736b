"""The commands that fill the gaps of a table."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from edadm.records import FP_METHOD, Record
from edadm.report.labels import base_label


@dataclass(frozen=True)
class Missing:
    """A cell or row without a record, and the command that makes it."""

    what: str
    command: str


def command(record: Record, *, seeds: Sequence[int] = (), bits: Record | None = None) -> str:
    """Return the command of a record's run, with other seeds or the bit widths of another record if given."""
    words = _words(record)
    if bits is not None:
        words = [*_without(words, ["bits"]), *(word for word in _words(bits) if _key(word) == "bits")]
    if seeds:
        words = [*_without(words, ["seed"]), f"seed={','.join(map(str, seeds))}"]
    return _line(["-m", *words] if len(seeds) > 1 else words)


def fp_command(record: Record) -> str:
    """Return the command of the full-precision run that a record is to be compared with."""
    words = _without(_words(record), ["method", "bits", "seed", *record.variant])
    return _line([*words, f"method={FP_METHOD}"])


def missing_seeds(rows: Mapping[str, list[Record]], siblings: list[Record], table: Record) -> list[Missing]:
    """Return what the rows of one table lack of the seeds that the same table has at any bit width.

    rows maps labels to the runs of the table; a row without runs takes its command from its siblings at other bits.
    """
    seeds = sorted({record.seed for record in siblings})
    found = []
    for label, runs in sorted(rows.items()):
        template = (runs or [record for record in siblings if base_label(record) == label])[0]
        if absent := [seed for seed in seeds if seed not in {record.seed for record in runs}]:
            what = f"{label}, seed{'s' if len(absent) > 1 else ''} {', '.join(map(str, absent))}"
            found.append(Missing(what, command(template, seeds=absent, bits=table)))
    return found


def _words(record: Record) -> list[str]:
    """Return the overrides that make a run; without recorded ones, those that follow from its fields."""
    if record.overrides:
        return list(record.overrides)
    fields = {name: getattr(record, name) for name in ("task", "method", "scope", "preset", "profile", "seed")}
    bits = [f"bits={record.bits.name}"]
    return (
        [f"{name}={value}" for name, value in fields.items()] + bits + [f"{k}={v}" for k, v in record.variant.items()]
    )


def _without(words: Iterable[str], keys: list[str]) -> list[str]:
    return [word for word in words if _key(word) not in keys]


def _key(word: str) -> str:
    """Return the group of an override: ``bits`` of ``bits=w4a8`` and of ``+bits.weight=5``."""
    return word.partition("=")[0].lstrip("+~").partition(".")[0].partition("@")[0]


def _line(words: list[str]) -> str:
    return shlex.join(["python", "run.py", *words])

"""Which runs share a row, and what the row is called."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from edadm.records import Record
from edadm.report.diff import flatten
from edadm.store import content_hash

# in a config, but no property of the method: runs that differ in these share a row
_NOT_THE_METHOD = frozenset(
    {"seed", "bits", "logger", "launcher", "sweep", "experiments", "hydra", "paths", "results", "device", "threads"}
)
# leaves of a config that say where a file or tensor lies; the protocol knows the content of the files
PLACES = frozenset({"path", "first_stage", "prompts", "weights", "reference", "sha256", "cache"})


def base_label(record: Record) -> str:
    """Return a run's method with the slots in which it differs from the method as published."""
    slots = ", ".join(f"{name}={value}" for name, value in sorted(record.variant.items()))
    return f"{record.method} ({slots})" if slots else record.method


def by_label(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Return the runs of one table by row.

    Runs of one method whose configs differ in more than the seed are never averaged: what differs is added to
    their label.
    """
    rows: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        rows[base_label(record)][content_hash(_method_config(record))].append(record)
    labelled: dict[str, list[Record]] = {}
    for label, variants in rows.items():
        told_apart = _distinguish([_method_config(runs[0]) for runs in variants.values()])
        for extra, runs in zip(told_apart, variants.values()):
            labelled[f"{label} [{extra}]" if extra else label] = runs
    return labelled


def plain(obj: Any) -> Any:
    """Return obj with the floats that cannot be hashed as text."""
    if isinstance(obj, Mapping):
        return {name: plain(value) for name, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [plain(value) for value in obj]
    return str(obj) if isinstance(obj, float) and not math.isfinite(obj) else obj


def _method_config(record: Record) -> dict[str, Any]:
    """Return the flat config that makes a row what it is: without seeds, places of files and bit widths."""
    config = {name: value for name, value in record.config.items() if name not in _NOT_THE_METHOD}
    leaves = flatten(plain(config)) if config else {}
    return {name: value for name, value in leaves.items() if name.rpartition(".")[2] not in PLACES | {"seed"}}


def _distinguish(configs: list[dict[str, Any]]) -> list[str]:
    """Return for each flat config the entries in which it differs from the others, empty if there is only one."""
    if len(configs) == 1:
        return [""]
    names = sorted({name for config in configs for name in config})
    differing = [name for name in names if len({str(config.get(name)) for config in configs}) > 1]
    return [", ".join(f"{name}={config.get(name)}" for name in differing) for config in configs]

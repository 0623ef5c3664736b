"""Which runs share a row, and what the row is called."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edadm.records import Record
from edadm.report.diff import flatten
from edadm.store import content_hash

# in a config, but no property of the method: runs that differ in these share a row
_NOT_THE_METHOD = frozenset(
    {"seed", "bits", "logger", "launcher", "sweep", "experiments", "hydra", "paths", "results", "device", "threads"}
)
_SHOWN_APART = {
    "sampler": "{}",
    "steps": "{} steps",
    "eta": "eta {}",
    "guidance": "guidance {}",
    "device": "device {}",
}
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


def sampling(record: Record) -> dict[str, Any]:
    """Return how the images of a run were sampled: sampler, steps, eta and guidance scale, None where not known."""
    part, guidance = record.protocol.get("sampler"), record.protocol.get("guidance")
    if not isinstance(part, Mapping):
        part = {"part": part, "steps": record.protocol.get("steps"), "eta": record.protocol.get("eta")}
    chosen = record.config.get("sampler")
    name = chosen.get("name") if isinstance(chosen, Mapping) else None
    return {
        "sampler": name or part.get("part"),
        "steps": part.get("steps"),
        "eta": part.get("eta"),
        "guidance": guidance.get("scale") if isinstance(guidance, Mapping) else None,
    }


def apart(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return for each of some groups of runs the sampling and device in which it differs from the others, as text."""
    differing = [name for name in _SHOWN_APART if len({one.get(name) for one in facts}) > 1]
    return [", ".join(_shown(name, one.get(name)) for name in differing) for one in facts]


def _shown(name: str, value: Any) -> str:
    return f"no {name}" if value in (None, "") else _SHOWN_APART[name].format(value)


def counted(statuses: Iterable[str]) -> str:
    """Return how many seeds ended in which way, as ``2 seeds diverged, 1 seed failed``."""
    counts = sorted(Counter(statuses).items())
    return ", ".join(f"{count} seed{'s' if count > 1 else ''} {status}" for status, count in counts)


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

"""The record of a benchmark: every measurement with the machine, its load and the code, as one JSON file.

``<results>/benchmarks/<task>-<date>.json``. Append-only: another run is another file, and the newest counts.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Row, clock_name, markdown, peak_mebibytes
from edadm.errors import EdadmError
from edadm.records import BENCHMARKS, provenance
from edadm.store import write_atomically

SCHEMA = 1
Load = tuple[float, ...]


@dataclass(frozen=True)
class Benchmark:
    """The operations measured in one process.

    unit: what ratios are in units of. load: the machine's load averages over 1, 5 and 15 minutes before the first and
    after the last measurement. facts: other numbers by name.
    """

    task: str
    title: str
    unit: str
    rows: tuple[Row, ...]
    clock: str
    threads: int
    load: tuple[Load, Load]
    peak_memory_mib: float
    facts: dict[str, float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def date(self) -> str:
        """When it was made (ISO 8601, UTC)."""
        return str(self.provenance["date"])

    @property
    def machine(self) -> str:
        """What it was measured on, load included."""
        made = self.provenance
        before, after = (f"{load[0]:.1f}" for load in self.load)
        return (
            f"{made['gpu'] or made['processor']}, {made['cores']} cores, {self.threads} "
            f"thread{'s' * (self.threads != 1)}, load {before} before and {after} after; torch "
            f"{made['libraries']['torch']}, Python {made['python']}; {self.clock}"
        )

    def row(self, operation: str) -> Row:
        """Return an operation by its name. Raises KeyError when it was not measured."""
        return {row.operation: row for row in self.rows}[operation]

    def __str__(self) -> str:
        facts = "".join(f"- {name}: {value:.3g}\n" for name, value in self.facts.items())
        head = f"{self.title} Unit: {self.unit}.\n{self.machine}. Peak memory {self.peak_memory_mib:.0f} MiB."
        return "\n\n".join(part for part in (head, facts, markdown(self.rows) if self.rows else "") if part)


@contextmanager
def one_setting(threads: int) -> Iterator[Load]:
    """Measure with so many threads of torch; gives the machine's load before."""
    others = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield os.getloadavg()
    finally:
        torch.set_num_threads(others)


def benchmark(
    task: str,
    title: str,
    unit: str,
    rows: list[Row],
    device: torch.device,
    threads: int,
    load: Load,
    facts: dict[str, float] | None = None,
    clock: str | None = None,
) -> Benchmark:
    """Return the record of measurements that have just ended; load: the machine's before the first of them.

    clock: what was read where it was not ``timing.clock``.
    """
    return Benchmark(
        task, title, unit, tuple(rows), clock or clock_name(device, threads), threads, (load, os.getloadavg()),
        peak_mebibytes(device), facts or {}, provenance(str(device)),
    )  # fmt: skip


def write(made: Benchmark, results: Path) -> Path:
    """Write a benchmark to a results folder and return the path. Raises EdadmError when it cannot.

    Beside the seconds of an operation stand, for readers of the file, what follows from them.
    """
    derived = [{"ratio": row.median, "quartiles": row.quartiles, "n": len(row.ratios)} for row in made.rows]
    data = dataclasses.asdict(made)
    data["rows"] = [row | more for row, more in zip(data["rows"], derived, strict=True)]
    date = made.date.partition("+")[0].replace(":", "-")
    path = Path(results) / BENCHMARKS / f"{made.task}-{date}.json"
    return write_atomically(path, json.dumps(data, indent=1) + "\n")


def read(path: Path) -> Benchmark:
    """Return the benchmark in a file. Raises EdadmError naming the file if it holds none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] > SCHEMA:
            raise ValueError(f"schema {data['schema']}, this version reads up to {SCHEMA}: update edadm")
        rows = tuple(_row(row) for row in data["rows"])
        before, after = (tuple(load) for load in data["load"])
        return Benchmark(**(data | {"rows": rows, "load": (before, after)}))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EdadmError(f"{path} holds no benchmark: {error}") from error


def newest(results: Path, task: str) -> tuple[Path, Benchmark] | None:
    """Return the newest benchmark of a task in a results folder and its file, None without one."""
    found = [(path, read(path)) for path in (Path(results) / BENCHMARKS).glob(f"{task}-*.json")]
    return max(found, key=lambda pair: pair[1].date, default=None)


def _row(data: dict[str, Any]) -> Row:
    texts = {name: data[name] for name in ("operation", "official", "target")}
    return Row(seconds=tuple(map(float, data["seconds"])), references=tuple(map(float, data["references"])), **texts)

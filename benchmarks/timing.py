"""Time operations in units of a reference that runs beside them, and lay the results out as a table.

On a shared machine seconds mean little. Every measurement therefore follows a measurement of the reference in the same
process, and what counts is the ratio of the two.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

HEADER = ("operation", "ms", "ours, median", "ours, min", "official", "target")


def clock(device: torch.device, threads: int) -> Callable[[], float]:
    """Return a clock in seconds: CPU time with one thread, which other jobs disturb least, else the wall's."""
    if device.type == "cuda":

        def synchronized() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return synchronized
    return time.process_time if threads == 1 else time.perf_counter


@dataclass
class Pairs:
    """Seconds of an operation, each beside the seconds of the reference run just before it."""

    reference: Callable[[], object]
    clock: Callable[[], float]
    seconds: list[float] = field(default_factory=list)
    references: list[float] = field(default_factory=list)
    _began: float | None = None

    def start(self) -> None:
        """Time the reference, then begin an operation."""
        began = self.clock()
        self.reference()
        self._began = self.clock()
        self.references.append(self._began - began)

    def stop(self) -> None:
        """End the operation that ``start`` began."""
        assert self._began is not None
        self.seconds.append(self.clock() - self._began)
        self._began = None

    def next(self) -> None:
        """End the operation under way, if there is one, and begin another."""
        if self._began is not None:
            self.stop()
        self.start()

    def repeat(self, operation: Callable[[], object], times: int) -> Pairs:
        """Run the operation once to warm up, then time it ``times`` times."""
        operation()
        for _ in range(times):
            self.start()
            operation()
            self.stop()
        return self

    def ratios(self, parts: float = 1) -> tuple[float, float]:
        """Return the median of the paired ratios and the ratio of the minima, of one of ``parts`` equal parts.

        parts below 1: the measurement was that share of the work.
        """
        paired = [own / other for own, other in zip(self.seconds, self.references, strict=False)]
        return statistics.median(paired) / parts, min(self.seconds) / min(self.references) / parts


@dataclass(frozen=True)
class Row:
    """One line of the table; ratios in units of the reference."""

    operation: str
    seconds: float
    median: float
    minimum: float
    official: str = "-"
    target: str = "-"

    @classmethod
    def of(cls, operation: str, pairs: Pairs, official: str = "-", target: str = "-", parts: float = 1) -> Row:
        """Sum up the measurements of an operation; parts as in ``Pairs.ratios``."""
        return cls(operation, statistics.median(pairs.seconds) / parts, *pairs.ratios(parts), official, target)


def markdown(rows: Iterable[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [HEADER, ("---", *("---:",) * (len(HEADER) - 1))]
    for row in rows:
        numbers = (f"{row.seconds * 1e3:.1f}", f"{row.median:.3g}", f"{row.minimum:.3g}")
        lines.append((row.operation, *numbers, row.official, row.target))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def peak_mebibytes(device: torch.device) -> float:
    """Return the largest memory of this process so far: resident, or allocated on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def machine(device: torch.device, threads: int) -> str:
    """Describe what the numbers were measured on, its load included."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    timed = "wall clock" if device.type == "cuda" or threads > 1 else "CPU time"
    return (
        f"{name}, {os.cpu_count()} cores, {threads} thread{'s' * (threads != 1)}, load {load}; "
        f"torch {torch.__version__}, Python {platform.python_version()}; {timed}"
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.is_file() else None
    return found[1] if found else platform.processor() or platform.machine()

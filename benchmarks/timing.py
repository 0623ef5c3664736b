"""Time operations in units of a reference that runs beside them, and lay the results out as a table.

On a shared machine seconds mean little. Every measurement therefore follows a measurement of the reference in the same
process, and what counts is the ratio of the two.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

HEADER = ("operation", "ms", "ours, median", "quartiles", "n", "official", "target")


def clock(device: torch.device, threads: int) -> Callable[[], float]:
    """Return a clock in seconds: CPU time with one thread, which other jobs disturb least, else the wall's."""
    if device.type == "cuda":

        def synchronized() -> float:
            torch.cuda.synchronize(device)
            return time.perf_counter()

        return synchronized
    return time.process_time if threads == 1 else time.perf_counter


def clock_name(device: torch.device, threads: int) -> str:
    """Return what ``clock`` reads."""
    return "wall clock" if device.type == "cuda" or threads > 1 else "CPU time"


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


@dataclass(frozen=True)
class Row:
    """One operation: its seconds, each beside the seconds of the reference before it, and what is known of it.

    official, target: ratios of the official code and those aimed at, as text.
    """

    operation: str
    seconds: tuple[float, ...]
    references: tuple[float, ...]
    official: str = "-"
    target: str = "-"

    @classmethod
    def of(cls, operation: str, pairs: Pairs, official: str = "-", target: str = "-", parts: float = 1) -> Row:
        """Sum up the measurements of an operation, each of which did ``parts`` of it: below 1, a share of the work."""
        seconds = tuple(value / parts for value in pairs.seconds)
        return cls(operation, seconds, tuple(pairs.references[: len(seconds)]), official, target)

    @property
    def ratios(self) -> list[float]:
        """The operation in units of the reference, once for every pair."""
        return [own / other for own, other in zip(self.seconds, self.references, strict=True)]

    @property
    def median(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper quartile of the ratios."""
        if len(self.ratios) < 2:
            return self.median, self.median
        low, _, high = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return low, high

    @property
    def least_seconds(self) -> float:
        """The seconds of the measurement that other work disturbed least."""
        return min(self.seconds)


def markdown(rows: Iterable[Row]) -> str:
    """Return the rows as a Markdown table."""
    lines = [HEADER, ("---", *("---:",) * (len(HEADER) - 1))]
    for row in rows:
        low, high = row.quartiles
        spread = f"{low:.3g} to {high:.3g}"
        milliseconds = f"{statistics.median(row.seconds) * 1e3:.1f}"
        numbers = (milliseconds, f"{row.median:.3g}", spread, str(len(row.seconds)))
        lines.append((row.operation, *numbers, row.official, row.target))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def peak_mebibytes(device: torch.device) -> float:
    """Return the largest memory of this process so far: resident, or allocated on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)

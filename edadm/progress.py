"""What a run shows while it works: progress of a stage, its seconds, its peak memory, and the load beside it."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

logger = logging.getLogger(__name__)

BAR_AFTER = 2.0  # seconds until a bar appears
NOTE_EVERY = 2.0  # seconds between two notes of the time spent
LINE_EVERY = 30.0  # seconds between lines when the output is no terminal
_CLEAR_PEAK = "5"  # proc(5): resets the high-water mark of the resident set


class Progress:
    """The progress of a run's stages: bars on a terminal, plain log lines elsewhere, both with an estimate.

    label: the run, as method and bits. pulse: called at each sign of life. Called as ``progress(stage, done, total)``.
    """

    def __init__(self, label: str, pulse: Callable[[], None] | None = None):
        self.label, self.pulse = label, pulse
        self._stage = ""
        self._first = 0
        self._started = self._last_line = 0.0
        self._bar: Any = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` parts of a stage are finished; the estimate counts from the first call."""
        if self.pulse is not None:
            self.pulse()
        if stage != self._stage:
            self._open(stage, done, total)
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            if done >= total:
                self._close()
        elif (now := time.monotonic()) - self._last_line >= LINE_EVERY:
            self._last_line = now
            logger.info("%s", self.line(done, total, now - self._started))

    def line(self, done: int, total: int, elapsed: float) -> str:
        """Return the progress of the present stage as one line with the time that remains."""
        steps = done - self._first
        left = f", about {duration(elapsed / steps * (total - done))} left" if steps > 0 else ""
        return f"{self._stage} [{self.label}]: {done} of {total}{left}"

    def _open(self, stage: str, done: int, total: int) -> None:
        self._close()
        self._stage, self._first = stage, done
        self._started = self._last_line = time.monotonic()
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total, initial=done, desc=f"{stage} [{self.label}]", delay=BAR_AFTER, leave=False, unit=""
            )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._stage = None, ""


class Meter:
    """Seconds and peak memory of the code inside ``with``, and what else the machine did meanwhile.

    Peak memory in MiB: of the GPU where the stage runs on one, else of the resident set of this process. other_load:
    the mean number of cores that other processes of the machine kept busy.
    memo: a file that keeps the seconds of an attempt that is killed; those of earlier attempts count.
    """

    def __init__(self, device: str = "cpu", memo: Path | None = None):
        self.device, self.memo = device, memo
        self.seconds = 0.0
        self.peak_memory_mib: float | None = None
        self.other_load = 0.0
        self._before = self._noted = 0.0

    def __enter__(self) -> Meter:
        self._started, self._others = time.perf_counter(), _seconds_of_others()
        if self.memo is not None and self.memo.is_file():
            self._before = _number(self.memo.read_text(encoding="utf-8"))
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.init()  # the statistics of a device named by its number do not start it
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _reset_peak()
        return self

    def note(self) -> None:
        """Write the seconds so far into the memo, at most every few seconds."""
        if self.memo is not None and self._elapsed() - self._noted >= NOTE_EVERY:
            self._noted = self._elapsed()
            self.memo.write_text(f"{self._before + self._noted:.1f}", encoding="utf-8")

    def _elapsed(self) -> float:
        return time.perf_counter() - self._started

    def __exit__(self, *error: object) -> None:
        if self.device.startswith("cuda"):
            import torch

            torch.cuda.synchronize(self.device)
            self.peak_memory_mib = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            self.peak_memory_mib = _peak()
        elapsed = self._elapsed()
        self.seconds = self._before + elapsed
        self.other_load = max(0.0, _seconds_of_others() - self._others) / elapsed


def _seconds_of_others() -> float:
    """Return the CPU seconds that all processes but this one have used since the machine started."""
    machine, own = psutil.cpu_times(), psutil.Process().cpu_times()
    return float(machine.user + machine.system + getattr(machine, "nice", 0.0) - own.user - own.system)


def _number(text: str) -> float:
    """Return the number a kill may have cut short, 0 if nothing is left of it."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def _reset_peak() -> None:
    with suppress(OSError):  # not Linux: the peak of the whole process is reported
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)


def _peak() -> float:
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def duration(seconds: float) -> str:
    """Return seconds as people say them: 8 s, 2 min 05 s, 1 h 20 min, 1,234 days."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole >= 100 * 3600:
        return f"{whole / 86400:,.0f} days"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

"""What a sweep is doing: small files in which its runs announce themselves, for `python -m edadm.results status`.

``<results set>/.runs/<hash>.json`` holds one run, ``<results set>/.runs/sweeps/<name>.json`` the jobs of a sweep.
Journals are hints, not results: deleting them loses nothing but the view of what is running.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edadm.errors import EdadmError
from edadm.store import write_atomically

logger = logging.getLogger(__name__)

ACTIVE = "running"
SIGN_EVERY = 60.0  # seconds between two signs of life of a stage
SILENT_AFTER = 1800.0  # seconds without news after which a run on another host counts as killed


@dataclass(frozen=True)
class Run:
    """One run as it last announced itself. Times are seconds since the epoch; ``artefacts`` maps stages to hashes."""

    hash: str
    label: str
    state: str
    stage: str | None
    started: float
    updated: float
    pid: int
    host: str
    process_start: str | None
    sweep: str | None = None
    error: str | None = None
    artefacts: dict[str, str] = field(default_factory=dict)

    @property
    def is_alive(self) -> bool:
        """Say whether the process still runs; of another host only the time of its last news is known."""
        if self.host != socket.gethostname():
            return time.time() - self.updated < SILENT_AFTER
        return _process_start(self.pid) == self.process_start and _exists(self.pid)

    @property
    def current_state(self) -> str:
        """Return the state, where a running one without its process is ``killed``."""
        return "killed" if self.state == ACTIVE and not self.is_alive else self.state


@dataclass(frozen=True)
class Sweep:
    """The jobs of a sweep, (hash, label) in their order; a label is the run's command-line overrides."""

    name: str
    jobs: tuple[tuple[str, str], ...]
    announced: float


def announce_sweep(results_dir: Path, name: str, jobs: Sequence[tuple[str, str]]) -> None:
    """Write down which runs a sweep will make, as (hash, label); announced again it is replaced."""
    sweep = Sweep(name, tuple((hash, label) for hash, label in jobs), time.time())
    _write(_folder(results_dir) / "sweeps" / f"{_file_name(name)}.json", dataclasses.asdict(sweep))


def start_run(results_dir: Path, hash: str, label: str, sweep: str | None = None) -> None:
    """Announce that this process begins a run."""
    now, pid = time.time(), os.getpid()
    run = Run(hash, label, ACTIVE, None, now, now, pid, socket.gethostname(), _process_start(pid), sweep)
    _write(_path(results_dir, hash), dataclasses.asdict(run))


def update_run(
    results_dir: Path, hash: str, stage: str | None = None, artefacts: Mapping[str, str] | None = None
) -> None:
    """Announce that a run lives, its stage and the artefacts (stage to hash) it has used, which gc then keeps."""
    run = read_run(results_dir, hash)
    if run is not None:
        known = run.artefacts | dict(artefacts or {})
        changed = dataclasses.replace(run, stage=stage or run.stage, updated=time.time(), artefacts=known)
        _write(_path(results_dir, hash), dataclasses.asdict(changed))


def show_life(results_dir: Path, hash: str) -> None:
    """Announce that a run is alive if its last news is old, for a stage that takes long."""
    try:
        age = time.time() - _path(results_dir, hash).stat().st_mtime
    except OSError:
        return
    if age > SIGN_EVERY:
        update_run(results_dir, hash)


def finish_run(results_dir: Path, hash: str, state: str, error: str | None = None) -> None:
    """Announce how a run ended: ``ok``, ``skipped``, ``diverged`` or ``failed`` with the error."""
    run = read_run(results_dir, hash)
    if run is not None:
        ended = dataclasses.replace(run, state=state, error=error, updated=time.time())
        _write(_path(results_dir, hash), dataclasses.asdict(ended))


def read_run(results_dir: Path, hash: str) -> Run | None:
    """Return the journal of a run, None if there is none or it is broken."""
    data = _read(_path(results_dir, hash))
    try:
        return None if data is None else Run(**data)
    except TypeError as error:
        logger.warning("ignored the journal of run %s: %s", hash, error)
        return None


def read_runs(results_dir: Path) -> list[Run]:
    """Return the journals of all runs of a results set, oldest first."""
    runs = [read_run(results_dir, path.stem) for path in sorted(_folder(results_dir).glob("*.json"))]
    return sorted((run for run in runs if run is not None), key=lambda run: (run.started, run.hash))


def read_sweeps(results_dir: Path) -> list[Sweep]:
    """Return the announced sweeps of a results set, oldest first."""
    found = [_read(path) for path in sorted((_folder(results_dir) / "sweeps").glob("*.json"))]
    sweeps = [
        Sweep(data["name"], tuple((hash, label) for hash, label in data["jobs"]), data["announced"])
        for data in found
        if data is not None
    ]
    return sorted(sweeps, key=lambda sweep: (sweep.announced, sweep.name))


def _folder(results_dir: Path) -> Path:
    return Path(results_dir) / ".runs"


def _path(results_dir: Path, hash: str) -> Path:
    return _folder(results_dir) / f"{hash}.json"


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.=,-]", "_", name)[:120]


def _write(path: Path, data: dict[str, Any]) -> None:
    """Write a journal; a run never fails for want of one."""
    try:
        write_atomically(path, json.dumps(data) + "\n")
    except EdadmError as error:
        logger.warning("no journal: %s", error)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("ignored the journal %s: %s", path, error)
        return None
    return data if isinstance(data, dict) else None


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _process_start(pid: int) -> str | None:
    """Return the start time of a process in the kernel's ticks, which tells it from a later one with the same number.

    None where there is no /proc; then the number alone must do. A zombie has ended.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]

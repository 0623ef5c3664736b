"""The file of a diagnostic: what was measured of one run besides its record.

``results/<set>/<task>/diagnostics/<run hash>-<name>.json``. Light to import: reports read these files without torch.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edadm.errors import EdadmError
from edadm.records import DIAGNOSTICS, path_of
from edadm.store import write_atomically

logger = logging.getLogger(__name__)

SCHEMA = 1
DIGITS = 6  # significant digits kept of a float


@dataclass(frozen=True)
class Diagnostic:
    """One measurement of one run.

    run: hash of the run's record. values: what the diagnostic's function returned; it holds ``n`` (what was counted,
    how many) and ``unit`` (quantity to unit) besides the numbers. version: of that function.
    """

    name: str
    version: int
    run: str
    task: str
    values: dict[str, Any]
    seconds: float
    provenance: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA


def diagnostic_path(results_dir: Path, task: str, run: str, name: str) -> Path:
    """Return the file of a diagnostic in a results set such as ``results/local``."""
    return path_of(results_dir, task, run).parent / DIAGNOSTICS / f"{run}-{name}.json"


def write_diagnostic(diagnostic: Diagnostic, results_dir: Path) -> Path:
    """Write a diagnostic atomically and return its path; NaN and infinities become null, floats keep 6 digits."""
    path = diagnostic_path(results_dir, diagnostic.task, diagnostic.run, diagnostic.name)
    return write_atomically(path, json.dumps(_plain(dataclasses.asdict(diagnostic)), allow_nan=False) + "\n")


def find_diagnostic(results_dirs: Iterable[Path], task: str, run: str, name: str, version: int) -> Path | None:
    """Return the first file of a diagnostic of this version in some results sets, None without one."""
    for folder in results_dirs:
        path = diagnostic_path(folder, task, run, name)
        found = _read(path) if path.is_file() else None
        if found is not None and found.version == version:
            return path
    return None


def read_diagnostics(folders: Iterable[Path], name: str | None = None) -> list[Diagnostic]:
    """Return the diagnostics below some results folders (of one name), in the order of their paths.

    A broken file is skipped with a warning that names it.
    """
    paths = [path for folder in folders for path in sorted(Path(folder).rglob(f"{DIAGNOSTICS}/*.json"))]
    wanted = [path for path in paths if name is None or path.stem.partition("-")[2] == name]
    return [diagnostic for path in wanted if (diagnostic := _read(path)) is not None]


def _read(path: Path) -> Diagnostic | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.get("schema", 0) > SCHEMA:
            raise EdadmError(f"schema {data['schema']}, this version reads up to {SCHEMA}: update edadm")
        return Diagnostic(**data)
    except (OSError, ValueError, TypeError, AttributeError, EdadmError) as error:
        logger.warning("skipped a broken diagnostic: %s: %s", path, error)
        return None


def _plain(obj: Any) -> Any:
    if isinstance(obj, Mapping):
        return {str(name): _plain(value) for name, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_plain(value) for value in obj]
    if isinstance(obj, float):
        return float(f"{obj:.{DIGITS}g}") if math.isfinite(obj) else None
    return obj

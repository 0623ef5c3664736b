"""The record of a run: one JSON file that says what was run, what came out, what it cost and where.

``results/<set>/<task>/<hash>.json``; tables, figures and Weights & Biases are written from records and from nothing
else. A record is append-only: `write` keeps an existing result of the same hash unless the run was repeated explicitly.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edadm.errors import EdadmError
from edadm.store import write_atomically

logger = logging.getLogger(__name__)

SCHEMA = 1
STATUSES = ("ok", "skipped", "diverged", "failed")
FP_METHOD = "fp"
DIAGNOSTICS, DRAWS, BENCHMARKS, CARDS = BESIDE = "diagnostics", "draws", "benchmarks", "cards"  # no records of runs
QUANTIZATION_STAGES = ("calibration", "ranges", "reconstruction")
_LIBRARIES = (
    "edadm",
    "torch",
    "torchvision",
    "diffusers",
    "torch-fidelity",
    "torchmetrics",
    "open_clip_torch",
    "timm",
    "numpy",
    "safetensors",
    "hydra-core",
)


@dataclass(frozen=True)
class Bits:
    """Bit widths of a run and their name in ``conf/bits``; 16 and 32 mean not quantized."""

    name: str
    weight: int
    act: int
    softmax: int = 8


@dataclass(frozen=True)
class Stage:
    """What one stage cost when it was computed; ``reused`` says that this run found its result in the store.

    other_load: the mean number of cores that other processes kept busy meanwhile, None in records that do not say.
    """

    seconds: float | None
    peak_memory_mib: float | None = None
    reused: bool = False
    other_load: float | None = None


@dataclass(frozen=True)
class Record:
    """One finished run.

    ``metrics`` maps a name to ``{value, n, reason, interval, higher_is_better, proxy, unit}`` (value None needs a
    reason) or, for curves, to ``{values: [...], n, unit}``. ``variant`` holds the slots in which the run differs from
    its method as published (``{"calibration": "random"}``); ``overrides`` are the words of the command line that make
    the run again. ``protocol`` is everything two numbers must share to be compared (sampler, steps, eta, reference
    statistics, feature network and their sha256). ``expected_band`` maps a metric to [low, high] of the task's
    full-precision model. ``artefacts`` maps a stage to the hash of its artefact, ``outputs`` a name to a file
    beside the record.
    """

    hash: str
    task: str
    method: str
    bits: Bits
    scope: str
    preset: str
    profile: str
    seed: int
    n_images: int
    status: str = "ok"
    reason: str | None = None
    precision: str = "fp32"
    calibration: str = "none"
    transform: str = "none"
    ranges: str = "none"
    reconstruction: str = "none"
    optimization: str = "none"
    activation_sets: str = "static"
    correction: str = "none"
    sweep: str | None = None
    variant: dict[str, str] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    protocol: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    expected_band: dict[str, list[float]] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=dict)
    artefacts: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    sites: list[dict[str, Any]] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        """Check the fields that every reader relies on."""
        if self.status not in STATUSES:
            raise ValueError(f"status is {self.status!r}, expected one of {', '.join(STATUSES)}")
        if self.status != "ok" and not self.reason:
            raise ValueError(f"a record with status {self.status} needs a reason")

    @property
    def is_fp(self) -> bool:
        """Say whether this is the full-precision row of its task."""
        return self.method == FP_METHOD

    @property
    def quantization_seconds(self) -> float | None:
        """Return the seconds that calibration, ranges and reconstruction took when computed, None if unknown."""
        known = [stage.seconds for stage in self._quantization_stages() if stage.seconds is not None]
        return sum(known) if known else None

    @property
    def quantization_peak_mib(self) -> float | None:
        """Return the peak memory of the quantization stages in MiB, None if unknown."""
        peaks = [stage.peak_memory_mib for stage in self._quantization_stages()]
        return max((peak for peak in peaks if peak is not None), default=None)

    @property
    def quantization_other_load(self) -> float | None:
        """Return the mean number of cores that other processes kept busy during quantization, None if unknown."""
        known = [s for s in self._quantization_stages() if s.seconds and s.other_load is not None]
        seconds = sum(stage.seconds or 0.0 for stage in known)
        return sum((s.seconds or 0.0) * (s.other_load or 0.0) for s in known) / seconds if known else None

    def _quantization_stages(self) -> list[Stage]:
        return [stage for name, stage in self.stages.items() if name in QUANTIZATION_STAGES]


def to_dict(record: Record) -> dict[str, Any]:
    """Return a record as JSON types; floats that JSON lacks become the strings nan, inf and -inf."""
    fields: dict[str, Any] = _encode(dataclasses.asdict(record))
    return {"schema": record.schema} | fields


def from_dict(data: Mapping[str, Any]) -> Record:
    """Return the record of `to_dict`'s form. Raises EdadmError naming what is missing, unknown or of a later schema."""
    if not isinstance(data, Mapping) or "schema" not in data:
        raise EdadmError("not a record: it has no `schema`")
    if not isinstance(data["schema"], int) or data["schema"] > SCHEMA:
        raise EdadmError(f"record schema {data['schema']}, this version reads up to {SCHEMA}: update edadm")
    fields = {item.name: item for item in dataclasses.fields(Record)}
    required = {
        name
        for name, item in fields.items()
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(data)):
        raise EdadmError(f"not a record: it lacks {', '.join(missing)}")
    if unknown := sorted(set(data) - set(fields)):
        raise EdadmError(f"unknown record fields: {', '.join(unknown)}")
    try:
        typed = {
            "bits": Bits(**data["bits"]),
            "stages": {name: Stage(**stage) for name, stage in data.get("stages", {}).items()},
            "metrics": _decode(data.get("metrics", {})),
            "cost": _decode(data.get("cost", {})),
        }
        return Record(**(dict(data) | typed))
    except (TypeError, ValueError, AttributeError) as error:
        raise EdadmError(f"not a record: {error}") from error


def read(path: Path) -> Record:
    """Return the record in a file. Raises EdadmError naming the file if it is none."""
    try:
        return from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (EdadmError, ValueError) as error:
        raise EdadmError(f"{path}: {error}") from error
    except OSError as error:
        raise EdadmError(f"cannot read the record {path}: {error.strerror or error}") from error


def read_all(folders: Iterable[Path]) -> list[Record]:
    """Return the records below some folders, one per hash (the newest), in the order of their paths."""
    return [record for _, record in located(folders)]


def located(folders: Iterable[Path]) -> list[tuple[Path, Record]]:
    """Return the records below some folders with their files, one per hash (the newest), in the order of their paths.

    A broken file is skipped with a warning that names it; hidden files and folders, and those of ``BESIDE``, hold none.
    """
    found: dict[str, tuple[Path, Record]] = {}
    for folder in map(Path, folders):
        for path in sorted(folder.rglob("*.json")):
            if any(part.startswith(".") or part in BESIDE for part in path.relative_to(folder).parts):
                continue
            try:
                record = read(path)
            except EdadmError as error:
                logger.warning("skipped a broken record: %s", error)
                continue
            if record.hash not in found or date(record) >= date(found[record.hash][1]):
                found[record.hash] = path, record
    return list(found.values())


def date(record: Record) -> str:
    """Return when a record was made (ISO 8601, UTC), or an empty string."""
    return str(record.provenance.get("date", ""))


def device_kind(record: Record) -> str:
    """Return cpu or cuda, or an empty string where a record does not say; numbers differ a little between the two."""
    return str(record.provenance.get("device") or "").partition(":")[0]


def path_of(results_dir: Path, task: str, hash: str) -> Path:
    """Return the file of a record in a results set such as ``results/local``."""
    return Path(results_dir) / task / f"{hash}.json"


def pictures(record: Record, results_dirs: Iterable[Path]) -> list[Path]:
    """Return the PNG files of a record that are there."""
    names = [name for name in record.outputs.values() if name.endswith(".png")]
    folders = [path_of(Path(folder), record.task, record.hash).parent for folder in results_dirs]
    return [folder / name for folder in folders for name in names if (folder / name).is_file()]


def find(results_dir: Path, task: str, hash: str) -> Record | None:
    """Return the record of a run if it exists and is readable, so that a sweep skips finished cells."""
    path = path_of(results_dir, task, hash)
    if not path.is_file():
        return None
    try:
        return read(path)
    except EdadmError as error:
        logger.warning("the run is made again: %s", error)
        return None


def find_finished(results_dirs: Iterable[Path], task: str, hash: str) -> Path | None:
    """Return the file of the first record with status ok of a run in some results sets, None without one."""
    for folder in results_dirs:
        record = find(folder, task, hash)
        if record is not None and record.status == "ok":
            return path_of(folder, task, hash)
    return None


def write(record: Record, results_dir: Path, *, rerun: bool = False) -> Path:
    """Write a record to ``<results_dir>/<task>/<hash>.json`` atomically and return the path.

    A record with status ok stays, since the same hash means the same run; ``rerun=True``, for a run that the user
    repeated explicitly, replaces it. One of a run that diverged, failed or was skipped is always replaced: a device or
    a library, which no hash holds, may have been the reason. Raises EdadmError when the folder cannot be written.
    """
    path = path_of(results_dir, record.task, record.hash)
    old = find(results_dir, record.task, record.hash)
    if old is not None and old.status == "ok" and not rerun:
        if _comparable(old) != _comparable(record):
            logger.warning("%s holds another result of the same run: it is kept; delete it to keep this one", path)
        return path
    return write_atomically(path, json.dumps(to_dict(record), indent=1, allow_nan=False) + "\n")


def ensure_writable(results_dir: Path) -> None:
    """Raise EdadmError now if records could not be written to a folder, rather than after hours of computing."""
    probe = write_atomically(Path(results_dir) / f".probe-{os.getpid()}", "")
    probe.unlink(missing_ok=True)


def provenance(device: str | None = None) -> dict[str, Any]:
    """Return where a run happens: commit, library versions, device, threads, platform, date and command line.

    Recorded, never hashed. torch is asked only if the process has already imported it.
    """
    torch = sys.modules.get("torch")
    gpu = torch is not None and str(device).startswith("cuda") and torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        "git": _git_state(Path(__file__).parent),
        "libraries": {name: version for name in _LIBRARIES if (version := _version(name)) is not None},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads() if torch is not None else None,
        "tf32": torch.backends.cudnn.allow_tf32 if torch is not None and gpu else None,
        "device": device,
        "gpu": torch.cuda.get_device_name(device) if torch is not None and gpu else None,
    }


def _comparable(record: Record) -> dict[str, Any]:
    """Return what two runs of one hash must share; time, place and files differ."""
    volatile = ("provenance", "stages", "cost", "outputs", "artefacts", "sweep", "overrides")
    return {name: value for name, value in to_dict(record).items() if name not in volatile}


def _encode(obj: Any) -> Any:
    if isinstance(obj, Mapping):
        return {str(name): _encode(value) for name, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_encode(value) for value in obj]
    if hasattr(obj, "item") and not isinstance(obj, str | int | float):
        return _encode(obj.item())  # a numpy or torch scalar
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if isinstance(obj, float) and not math.isfinite(obj):
        return str(obj)
    return obj


def _decode(obj: Any) -> Any:
    if isinstance(obj, Mapping):
        return {name: _decode(value) for name, value in obj.items()}
    if isinstance(obj, list):
        return [_decode(value) for value in obj]
    return float(obj) if obj in ("nan", "inf", "-inf") else obj


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit of the checkout that holds folder and whether it has changes, None outside of one."""
    commit = _git(folder, "rev-parse", "HEAD")
    # an installed copy may lie inside somebody else's checkout, whose commit says nothing about it
    if commit is None or _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _processor() -> str:
    """Return the processor's model name; Linux keeps it in /proc."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())

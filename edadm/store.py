"""Artefacts by content hash: computed once, checked when read, found again after a kill.

A stage of a run is a pure function of its key (a JSON-like dict: resolved config, hashes of the inputs, versions of the
parts). Its result is a folder ``<root>/<stage>/<hash>/`` with a ``manifest.json`` that holds the key and the sha256 of
every file. Nothing in the folder of an artefact is ever changed: it is built elsewhere and renamed into place.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import math
import numbers
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from edadm.errors import EdadmError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SCHEMA = 1
_TEMPORARY = ".tmp-"
_PARTIAL = ".partial"
SCRATCH = "scratch"  # the folder of a build for what only a resumed build needs; no part of the artefact
_verified: set[Path] = set()


def cache_root() -> Path:
    """Return the folder of the artefacts: ``EDADM_CACHE``, else ``~/.cache/edadm``."""
    return Path(os.environ.get("EDADM_CACHE") or Path.home() / ".cache" / "edadm").expanduser()


def normalise(obj: Any, where: str = "key") -> Any:
    """Return obj in the JSON types whose text is hashed.

    Tuples become lists, dataclasses dicts, paths strings, and whole floats integers (``eta=0`` and ``eta=0.0`` mean the
    same). Raises ValueError for NaN, infinities, colliding keys and types without an obvious form; ``where`` names
    the place in the message.
    """
    if obj is None or isinstance(obj, str | bool):
        return obj
    if isinstance(obj, numbers.Integral):
        return int(obj)
    if isinstance(obj, numbers.Real):
        value = float(obj)
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}: a hashed key must be finite")
        return int(value) if value.is_integer() else value
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        return normalise({field.name: getattr(obj, field.name) for field in dataclasses.fields(obj)}, where)
    if isinstance(obj, Mapping):
        named = {str(name): normalise(value, f"{where}.{name}") for name, value in obj.items()}
        if len(named) != len(obj):
            raise ValueError(f"{where} has keys that are equal as text: {sorted(map(str, obj))}")
        return named
    if isinstance(obj, list | tuple):
        return [normalise(value, f"{where}[{index}]") for index, value in enumerate(obj)]
    raise ValueError(f"{where} is a {type(obj).__name__} without a JSON form: pass numbers, strings, lists or dicts")


def content_hash(obj: Any) -> str:
    """Return 16 hex digits of the sha256 of the canonical JSON of obj (see `normalise`)."""
    text = json.dumps(normalise(obj), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_disk_full(error: BaseException) -> bool:
    """Say whether an error, or one it was raised from, means a full disk or quota.

    The writers of torch and safetensors raise their own types, which name the system's error only in the text.
    """
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, OSError) and chain.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(chain) or "os error 28" in str(chain):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside path, which takes its place when the block ends without an error.

    Readers see the old file or the whole new one, also after a kill or a power cut. Raises EdadmError when the disk is
    full or the folder cannot be written; the old file stays.
    """
    path = Path(path)
    temporary = path.parent / f"{_TEMPORARY}{os.getpid()}-{uuid.uuid4().hex[:8]}-{path.name}"
    try:
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
        except BaseException as error:
            if is_disk_full(error):
                raise _disk_full(path) from error
            raise
        with _writing(path):
            _fsync(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
    finally:
        if temporary.exists():
            temporary.unlink()


def write_atomically(path: Path, text: str) -> Path:
    """Write text (UTF-8) to path through `atomic_file` and return the path."""
    with atomic_file(path) as temporary, _writing(Path(path)):
        temporary.write_text(text, encoding="utf-8")
    return Path(path)


@dataclass(frozen=True)
class Artefact:
    """One folder of the store: a finished artefact, or what an unfinished build has left (``complete`` False)."""

    stage: str
    hash: str
    path: Path
    size: int  # bytes
    created: float  # seconds since the epoch
    label: str
    complete: bool


class Store:
    """The artefacts below one root folder (default `cache_root`); any number of processes may use it at once."""

    def __init__(self, root: Path | str | None = None) -> None:
        # absolute: an artefact keeps its name when the process changes its folder
        self.root = (Path(root).expanduser() if root is not None else cache_root()).absolute()

    def path(self, stage: str, key: Mapping[str, Any]) -> Path:
        """Return the folder that the artefact of a key has or would have."""
        return self.root / stage / content_hash(key)

    def find(self, stage: str, key: Mapping[str, Any]) -> Path | None:
        """Return the folder of a finished and intact artefact, else None."""
        folder = self.path(stage, key)
        return folder if folder.is_dir() and defect(folder) is None else None

    def workspace(self, stage: str, key: Mapping[str, Any]) -> Path:
        """Return the folder of an unfinished artefact, made if absent.

        It survives a kill, and `fetch` with ``resume=True`` hands it to ``build`` and renames it to the artefact once
        that returns. Files should be written with `atomic_file`, so that one that exists is whole.
        """
        folder = self.path(stage, key)
        partial = folder.with_name(folder.name + _PARTIAL)
        with _writing(partial):
            partial.mkdir(parents=True, exist_ok=True)
        return partial

    def fetch(
        self,
        stage: str,
        key: Mapping[str, Any],
        build: Callable[[Path], Mapping[str, Any] | None],
        label: str = "",
        *,
        resume: bool = False,
    ) -> Path:
        """Return the folder of the artefact of key, built by ``build(folder)`` if there is none.

        build writes its files into the folder it is given; what it returns (a JSON-like mapping or None) is kept as
        ``info`` in the manifest. With resume, the folder is the workspace of this key and holds what a killed
        or failed build left there, with SCRATCH until the artefact is in place; otherwise it is empty. One process
        builds, others wait for it. An artefact is checked against its manifest once per process and rebuilt with a
        warning if it is broken.
        Raises EdadmError when the store cannot be written or the disk is full.
        """
        folder = self.path(stage, key)
        if folder.is_dir() and defect(folder) is None:
            return folder
        with self._locked(stage, folder.name, label):
            if folder.is_dir():
                reason = defect(folder)
                if reason is None:
                    return folder
                logger.warning("%s artefact %s is broken (%s): it is computed again", stage, folder, reason)
                with _writing(folder):
                    shutil.rmtree(folder)
            self._build(folder, stage, key, build, label, resume)
        return folder

    def manifest(self, folder: Path) -> dict[str, Any]:
        """Return the manifest of an artefact: stage, hash, key, label, created, seconds, info, size and files."""
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest

    def artefacts(self) -> list[Artefact]:
        """List everything the store holds, sorted by stage and hash."""
        folders = [path for stage in _subfolders(self.root) for path in _subfolders(stage)]
        return [_describe(path) for path in folders if _is_hash(path.name.split(".")[0])]

    def remove(self, artefact: Artefact) -> bool:
        """Delete one artefact; return False and keep it while a process is building it."""
        path = self._lock_path(artefact.stage, artefact.hash)
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path).acquire(timeout=0), _writing(artefact.path):
                shutil.rmtree(artefact.path)
        except Timeout:
            return False
        _verified.discard(artefact.path)
        return True

    def _build(
        self,
        folder: Path,
        stage: str,
        key: Mapping[str, Any],
        build: Callable[[Path], Mapping[str, Any] | None],
        label: str,
        resume: bool,
    ) -> None:
        """Build into a folder of its own and rename it to the artefact; the caller holds the lock."""
        for leftover in folder.parent.glob(f"{folder.name}{_TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        work = self.workspace(stage, key) if resume else self._scratch(folder)
        started = time.perf_counter()
        try:
            info = build(work)
            manifest = {
                "schema": SCHEMA,
                "stage": stage,
                "hash": folder.name,
                "key": normalise(key),
                "label": label,
                "created": time.time(),
                "seconds": time.perf_counter() - started,
                "info": None if info is None else dict(info),
            }
            with _writing(folder):
                _seal(work, manifest)
                os.replace(work, folder)
                _fsync(folder.parent)
            shutil.rmtree(folder / SCRATCH, ignore_errors=True)
        except BaseException as error:
            if not resume:
                shutil.rmtree(work, ignore_errors=True)
            if is_disk_full(error) and not isinstance(error, EdadmError):
                raise _disk_full(folder) from error
            raise
        _verified.add(folder)

    def _scratch(self, folder: Path) -> Path:
        scratch = folder.with_name(f"{folder.name}{_TEMPORARY}{uuid.uuid4().hex[:8]}")
        with _writing(scratch):
            scratch.mkdir(parents=True)
        return scratch

    def _lock_path(self, stage: str, hash: str) -> Path:
        return self.root / ".locks" / f"{stage}-{hash}.lock"

    @contextmanager
    def _locked(self, stage: str, hash: str, label: str) -> Iterator[None]:
        """Hold the lock of one artefact, saying so in the log if another process has it."""
        path = self._lock_path(stage, hash)
        lock = FileLock(path)
        with _writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                logger.info("waiting for another process that computes %s %s %s", stage, hash, label)
                lock.acquire()
        try:
            yield
        finally:
            lock.release()


def defect(folder: Path) -> str | None:
    """Say what is wrong with an artefact's folder, or None; one that was intact is not read again in this process."""
    if folder in _verified and (folder / MANIFEST).is_file():
        return None
    _verified.discard(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if content_hash(manifest["key"]) != folder.name:
            return f"the key in {MANIFEST} has another hash"
        for name, expected in manifest["files"].items():
            if file_sha256(folder / name) != expected["sha256"]:
                return f"{name} does not have the sha256 of the manifest"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    _verified.add(folder)
    return None


def _seal(work: Path, manifest: dict[str, Any]) -> None:
    """Drop temporary files, sync the others to disk and write the manifest; SCRATCH is left alone."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(work.rglob("*")):
        if path.relative_to(work).parts[0] == SCRATCH:
            continue
        if path.name.startswith(_TEMPORARY):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif path.is_dir():
            _fsync(path)
        elif path.is_file() and path != work / MANIFEST:
            _fsync(path)
            files[path.relative_to(work).as_posix()] = {"sha256": file_sha256(path), "size": path.stat().st_size}
    manifest = manifest | {"size": sum(entry["size"] for entry in files.values()), "files": files}
    write_atomically(work / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False) + "\n")


def _describe(path: Path) -> Artefact:
    complete = "." not in path.name
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    label, created = "", path.stat().st_mtime
    if complete and (path / MANIFEST).is_file():
        try:
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            label, created = str(manifest.get("label", "")), float(manifest.get("created", created))
        except (ValueError, AttributeError, TypeError):
            label = "(broken manifest)"
    return Artefact(path.parent.name, path.name.split(".")[0], path, size, created, label, complete)


def _subfolders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_hash(name: str) -> bool:
    return len(name) == 16 and all(digit in "0123456789abcdef" for digit in name)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn the system's errors while path is written into messages that say what to do."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise _disk_full(path) from error
        raise EdadmError(
            f"cannot write {path}: {error.strerror or error}. "
            "Choose a folder that can be written (EDADM_CACHE for artefacts, results=... for records)."
        ) from error


def _disk_full(path: Path) -> EdadmError:
    return EdadmError(
        f"the disk is full while writing {path}. What was finished before is kept: free some space "
        "(`python -m edadm.results gc` shows what the cache holds) or point EDADM_CACHE to another disk, then run the "
        "same command again."
    )


def _fsync(path: Path) -> None:
    """Flush a file or the entries of a folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

from __future__ import annotations

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from edadm import store as store_module
from edadm.errors import EdadmError
from edadm.store import Store, atomic_file, cache_root, content_hash, defect, is_disk_full, write_atomically

KEY = {"task": "toy", "steps": 20, "eta": 0.0}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def writer(text: str, calls: list[str] | None = None) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        if calls is not None:
            calls.append(text)
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / "data.txt").write_text(text)

    return build


def forget() -> None:
    """Do as if this were a new process, which has verified nothing yet."""
    store_module._verified.clear()


def test_cache_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDADM_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("EDADM_CACHE")
    assert cache_root() == Path.home() / ".cache" / "edadm"


def test_hash_ignores_order_and_spelling_but_not_values() -> None:
    @dataclass(frozen=True)
    class Part:
        rows: int
        version: int = 1

    assert content_hash({"a": 1, "b": (2, 3)}) == content_hash({"b": [2, 3.0], "a": np.int64(1)})
    assert content_hash({"eta": 0}) == content_hash({"eta": 0.0})
    assert content_hash({"part": Part(4)}) == content_hash({"part": {"rows": 4, "version": 1}})
    assert content_hash({"a": 1}) != content_hash({"a": 2})
    assert content_hash({"a": True}) != content_hash({"a": 1})
    assert content_hash({"a": None}) != content_hash({})


def test_hash_is_the_same_in_every_process() -> None:
    """The canonical text is spelled out: a change of it would orphan every artefact and record."""
    text = rb'{"bits":[4,8],"lr":0.0004,"name":"\u00e9","task":"toy"}'
    assert (
        content_hash({"task": "toy", "lr": 4e-4, "bits": [4, 8], "name": "é"}) == hashlib.sha256(text).hexdigest()[:16]
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}, {1: "a", "1": "b"}])
def test_hash_refuses_what_has_no_canonical_form(value: object) -> None:
    with pytest.raises(ValueError, match=r"key\.x"):
        content_hash({"x": value})


def test_fetch_builds_once_and_describes_the_artefact(store: Store) -> None:
    calls: list[str] = []
    folder = store.fetch("stage", KEY, writer("one", calls), label="toy")
    assert store.fetch("stage", KEY, writer("two", calls)) == folder
    assert calls == ["one"]
    assert (folder / "sub" / "data.txt").read_text() == "one"
    manifest = store.manifest(folder)
    assert manifest["stage"] == "stage"
    assert manifest["key"] == {"task": "toy", "steps": 20, "eta": 0}
    assert manifest["files"]["sub/data.txt"]["size"] == 3
    [artefact] = store.artefacts()
    assert (artefact.stage, artefact.hash, artefact.label) == ("stage", folder.name, "toy")
    assert artefact.size == 3 + (folder / "manifest.json").stat().st_size
    assert artefact.complete


def test_what_build_returns_is_kept_in_the_manifest(store: Store) -> None:
    folder = store.fetch("stage", KEY, lambda _: {"rows": 256})
    assert store.manifest(folder)["info"] == {"rows": 256}


def test_a_flipped_byte_is_found_and_rebuilt_with_a_warning(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    folder = store.fetch("stage", KEY, writer("good"))
    data = folder / "sub" / "data.txt"
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(content)
    forget()
    assert store.find("stage", KEY) is None
    with caplog.at_level(logging.WARNING):
        store.fetch("stage", KEY, writer("good"))
    assert data.read_text() == "good"
    assert "broken" in caplog.text
    assert "data.txt" in caplog.text


@pytest.mark.parametrize("damage", ["missing file", "no manifest", "half a manifest", "another key"])
def test_every_other_damage_is_rebuilt_too(store: Store, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = store.fetch("stage", KEY, writer("good"))
    manifest = folder / "manifest.json"
    if damage == "missing file":
        (folder / "sub" / "data.txt").unlink()
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "half a manifest":
        manifest.write_text(manifest.read_text()[:40])
    else:
        manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"key": {"task": "other"}}))
    forget()
    with caplog.at_level(logging.WARNING):
        store.fetch("stage", KEY, writer("good"))
    assert "computed again" in caplog.text
    assert defect(folder) is None
    assert (folder / "sub" / "data.txt").read_text() == "good"


def test_an_artefact_is_read_for_checking_once_per_process(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.fetch("stage", KEY, writer("good"))
    forget()
    read: list[Path] = []
    checksum = store_module.file_sha256
    monkeypatch.setattr(store_module, "file_sha256", lambda path: read.append(path) or checksum(path))
    for _ in range(3):
        store.fetch("stage", KEY, writer("again"))
    assert len(read) == 1


def test_a_failed_build_leaves_nothing_behind(store: Store) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        store.fetch("stage", KEY, build)
    assert store.artefacts() == []
    assert store.find("stage", KEY) is None


def test_a_resumable_build_finds_what_it_left(store: Store) -> None:
    done: list[int] = []

    def build(folder: Path, stop: int | None) -> None:
        for chunk in range(4):
            path = folder / f"{chunk}.txt"
            if path.exists():
                continue
            if chunk == stop:
                raise KeyboardInterrupt
            write_atomically(path, str(chunk))
            done.append(chunk)

    with pytest.raises(KeyboardInterrupt):
        store.fetch("images", KEY, lambda folder: build(folder, 2), resume=True)
    [partial] = store.artefacts()
    assert not partial.complete
    assert store.find("images", KEY) is None
    assert sorted(path.name for path in store.workspace("images", KEY).iterdir()) == ["0.txt", "1.txt"]
    folder = store.fetch("images", KEY, lambda folder: build(folder, None), resume=True)
    assert done == [0, 1, 2, 3]
    assert sorted(store.manifest(folder)["files"]) == ["0.txt", "1.txt", "2.txt", "3.txt"]
    assert [artefact.complete for artefact in store.artefacts()] == [True]


KILLED = """
import sys, time
from pathlib import Path
from edadm.store import Store, atomic_file
def build(folder):
    for chunk in range(3):
        path = folder / f"{chunk}.bin"
        if path.exists():
            print("kept", chunk, flush=True)
            continue
        with atomic_file(path) as temporary:
            temporary.write_bytes(b"half")
            if chunk == int(sys.argv[2]):
                print("hanging", flush=True)
                time.sleep(60)
            temporary.write_bytes(bytes([chunk]) * 8)
print(Store(sys.argv[1]).fetch("images", {"k": 1}, build, resume=True))
"""


def test_sigkill_in_the_middle_of_a_file_loses_only_that_file(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen([*command, "1"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "hanging"
        process.send_signal(signal.SIGKILL)
    output = subprocess.run([*command, "-1"], capture_output=True, text=True, check=True).stdout.split("\n")
    assert output[0] == "kept 0"
    folder = Path(output[1])
    assert [path.read_bytes() for path in sorted(folder.glob("*.bin"))] == [bytes([chunk]) * 8 for chunk in range(3)]
    assert sorted(path.name for path in folder.iterdir()) == ["0.bin", "1.bin", "2.bin", "manifest.json"]


def slow_build(folder: Path) -> None:
    with open(folder.parent.parent.parent / "calls", "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(0.3)
    (folder / "data").write_text("x")


def fetch_slowly(root: Path) -> None:
    Store(root).fetch("stage", KEY, slow_build)


def test_parallel_jobs_compute_an_artefact_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=fetch_slowly, args=(tmp_path / "cache",)) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0, 0]
    assert len((tmp_path / "calls").read_text().split()) == 1


def test_leftovers_of_a_killed_build_are_dropped(store: Store) -> None:
    folder = store.path("stage", KEY)
    leftover = folder.with_name(f"{folder.name}.tmp-dead")
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("x")
    store.fetch("stage", KEY, writer("good"))
    assert not leftover.exists()


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_in_a_build_is_explained_and_loses_nothing(store: Store) -> None:
    kept = store.fetch("stage", {"k": 1}, writer("kept"))

    def build(folder: Path) -> None:
        if not (folder / "first").exists():
            write_atomically(folder / "first", "computed")
            no_space()

    with pytest.raises(EdadmError, match=r"disk is full.*gc"):
        store.fetch("stage", KEY, build, resume=True)
    assert (store.workspace("stage", KEY) / "first").read_text() == "computed"
    folder = store.fetch("stage", KEY, build, resume=True)
    assert (folder / "first").read_text() == "computed"
    forget()
    assert defect(kept) is None


def test_a_full_disk_while_sealing_is_explained(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_fsync", no_space)
        with pytest.raises(EdadmError, match="disk is full"):
            store.fetch("stage", KEY, writer("x"))
    assert store.artefacts() == []
    store.fetch("stage", KEY, writer("x"))


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomically(tmp_path / "record.json", "old")
    monkeypatch.setattr(store_module, "_fsync", no_space)
    with pytest.raises(EdadmError, match="disk is full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


def test_full_disks_are_recognised_in_the_errors_of_other_libraries() -> None:
    assert is_disk_full(RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"))
    try:
        try:
            no_space()
        except OSError as error:
            raise RuntimeError("unexpected pos 64 vs 0") from error
    except RuntimeError as error:
        assert is_disk_full(error)
    assert not is_disk_full(OSError(errno.ENOENT, "no such file"))


def test_a_missing_input_of_a_build_is_not_blamed_on_the_store(store: Store) -> None:
    with pytest.raises(FileNotFoundError, match="weights"):
        store.fetch("stage", KEY, lambda _: Path("/nonexistent/weights").read_bytes() and None)


def test_an_unwritable_root_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdadmError, match=r"cannot write .*EDADM_CACHE"):
        Store(tmp_path / "file" / "cache").fetch("stage", KEY, writer("x"))
    with pytest.raises(EdadmError, match="cannot write"), atomic_file(tmp_path / "file" / "x.json"):
        pass


def test_remove_deletes_an_artefact_but_not_one_in_use(store: Store) -> None:
    store.fetch("stage", KEY, writer("x"))

    def remove_myself(folder: Path) -> None:
        [mine] = [artefact for artefact in store.artefacts() if artefact.path == folder]
        assert not store.remove(mine)

    store.fetch("stage", {"k": 2}, remove_myself, resume=True)
    for artefact in store.artefacts():
        assert store.remove(artefact)
    assert store.artefacts() == []
    assert store.find("stage", KEY) is None

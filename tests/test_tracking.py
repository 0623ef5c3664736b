from __future__ import annotations

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from edadm import tracking
from edadm.errors import EdadmError
from edadm.store import cache_root
from edadm.tracking import push
from tests.report.records_for_tests import metric, record

BLOCK = 32768  # the file is a LevelDB log: blocks of records (crc u32, length u16, type u8), split over blocks if long


def messages(path: Path) -> Iterator[Any]:
    """Yield the protobuf records of a .wandb file, whose own reader is no longer part of the package."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := BLOCK - position % BLOCK) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if position > len(data):
            return  # still being written
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def logged(folder: Path) -> dict[str, Any]:
    """Return config, history rows, summary and run of an offline run."""
    found: dict[str, Any] = {"config": {}, "history": [], "summary": {}}
    path, deadline, kinds = next(folder.glob("run-*.wandb")), time.monotonic() + 30, [""]
    while kinds[-1:] != ["exit"] and time.monotonic() < deadline:  # W&B's service writes the file a moment later
        time.sleep(0.05)
        kinds = [message.WhichOneof("record_type") for message in messages(path)]
    for message in messages(path):
        kind = message.WhichOneof("record_type")
        if kind == "run":
            found["run"] = message.run
            found["config"] |= {item.key: json.loads(item.value_json) for item in message.run.config.update}
        elif kind == "history":
            items = message.history.item
            found["history"].append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
        elif kind == "summary":
            items = message.summary.update
            found["summary"] |= {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
    return found


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "grid.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(path)
    return path


def test_an_offline_run_holds_what_the_record_holds(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_has_key", lambda wandb: False)
    original = record(
        sweep="demo",
        metrics={
            "fd_tiny": metric(3.25, interval=[3.0, 3.5], proxy=True),
            "sqnr_per_step": {"values": [11.0, 12.5, 13.0], "n": 64, "unit": "dB"},
        },
        cost={"size_mb": 3.5},
    )
    folder = push(original, images=[picture], folder=tmp_path / "cache")
    assert folder is not None
    assert folder.is_relative_to(tmp_path / "cache" / "wandb")
    found = logged(folder)
    assert (found["run"].run_id, found["run"].run_group, found["run"].project) == (original.hash, "demo", "edadm")
    assert found["config"]["method"] == "edadm"
    assert found["config"]["bits"] == {"name": "w4a8", "weight": 4, "act": 8, "softmax": 8}
    assert found["config"]["config"] == original.config
    assert found["config"]["protocol"]["steps"] == 20
    curve = [row["curve/sqnr_per_step"] for row in found["history"] if "curve/sqnr_per_step" in row]
    assert curve == [11.0, 12.5, 13.0]
    [image] = [row["images/grid/path"] for row in found["history"] if "images/grid/path" in row]
    assert (folder / "files" / image).is_file()
    summary = found["summary"]
    assert summary["metrics/fd_tiny"] == 3.25
    assert (summary["metrics/fd_tiny/low"], summary["metrics/fd_tiny/high"]) == (3.0, 3.5)
    assert summary["cost/size_mb"] == 3.5
    assert summary["status"] == "ok"


def test_mode_none_does_nothing(tmp_path: Path) -> None:
    assert push(record(), mode="none", folder=tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_files_go_to_the_cache_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDADM_CACHE", str(tmp_path / "cache"))
    folder = push(record(), mode="offline")
    assert folder is not None
    assert folder.is_relative_to(cache_root() / "wandb")


def test_a_missing_wandb_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(EdadmError, match="pip install"):
        push(record())


def test_a_refusal_names_the_run_and_says_how_to_send_it_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def refuse(**_: object) -> None:
        raise wandb.errors.CommError("no route to host")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(EdadmError, match=rf"{record().hash}: no route to host.*push-wandb"):
        push(record(), mode="online", folder=tmp_path)

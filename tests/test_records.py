from __future__ import annotations

import dataclasses
import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edadm import records
from edadm.errors import EdadmError
from edadm.records import Record, Stage, from_dict, read, read_all, to_dict, write
from tests.report.records_for_tests import metric, record


def test_a_record_survives_the_round_trip(tmp_path: Path) -> None:
    original = record(
        variant={"calibration": "random"},
        artefacts={"calibration": "0" * 16},
        expected_band={"fd_tiny": [4.0, 6.0]},
        sites=[{"name": "conv_in", "role": "edge", "bits": 8}],
    )
    path = write(original, tmp_path / "local")
    assert path == tmp_path / "local" / "toy" / f"{original.hash}.json"
    assert read(path) == original
    assert json.loads(path.read_text())["schema"] == records.SCHEMA


def test_not_finite_and_numpy_values_survive(tmp_path: Path) -> None:
    values = {"values": [np.float32(1.5), math.inf, math.nan], "n": np.int64(64)}
    path = write(record(metrics={"sqnr_per_step": values, "fd_tiny": metric(math.nan)}), tmp_path)
    back = read(path).metrics
    assert back["sqnr_per_step"]["values"][:2] == [1.5, math.inf]
    assert math.isnan(back["sqnr_per_step"]["values"][2])
    assert back["sqnr_per_step"]["n"] == 64
    assert math.isnan(back["fd_tiny"]["value"])
    assert "NaN" not in path.read_text()


def test_status_is_checked() -> None:
    with pytest.raises(ValueError, match="skipped"):
        record(status="fine")
    with pytest.raises(ValueError, match="reason"):
        record(status="failed")


def test_a_result_is_kept_unless_the_run_is_repeated_explicitly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = record(fd=10.0)
    other = dataclasses.replace(first, metrics={"fd_tiny": metric(11.0)})
    path = write(first, tmp_path)
    with caplog.at_level(logging.WARNING):
        write(other, tmp_path)
    assert read(path) == first
    assert "delete it to keep this one" in caplog.text
    write(other, tmp_path, rerun=True)
    assert read(path) == other


def test_the_same_result_again_is_no_cause_for_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = record()
    write(first, tmp_path)
    with caplog.at_level(logging.WARNING):
        write(
            dataclasses.replace(first, stages={"ranges": Stage(1.0, 2.0, True)}, provenance={"date": "later"}), tmp_path
        )
    assert not caplog.records


@pytest.mark.parametrize("status", ["failed", "diverged", "skipped"])
def test_what_ended_without_a_result_is_replaced_by_the_next_try(tmp_path: Path, status: str) -> None:
    failed = record(status=status, reason="out of memory", metrics={})
    path = write(failed, tmp_path)
    done = dataclasses.replace(failed, status="ok", reason=None)
    write(done, tmp_path)
    assert read(path) == done


def test_find_returns_finished_cells_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    original = record()
    assert records.find(tmp_path, "toy", original.hash) is None
    path = write(original, tmp_path)
    assert records.find(tmp_path, "toy", original.hash) == original
    path.write_text("{")
    with caplog.at_level(logging.WARNING):
        assert records.find(tmp_path, "toy", original.hash) is None
    assert str(path) in caplog.text


def test_read_all_skips_broken_files_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = [record(seed=seed) for seed in range(2)]
    for one in kept:
        write(one, tmp_path / "local")
    (tmp_path / "local" / "toy" / "broken.json").write_text('{"schema": 1, "hash"')
    (tmp_path / "local" / "toy" / "other.json").write_text("[1, 2]")
    (tmp_path / "local" / ".runs").mkdir()
    (tmp_path / "local" / ".runs" / "journal.json").write_text("{}")
    with caplog.at_level(logging.WARNING):
        found = read_all([tmp_path])
    assert sorted(one.seed for one in found) == [0, 1]
    assert "broken.json" in caplog.text
    assert "other.json" in caplog.text
    assert len(caplog.records) == 2


def test_read_all_keeps_the_newest_of_one_hash(tmp_path: Path) -> None:
    old, new = record(provenance={"date": "2026-01-01"}), record(provenance={"date": "2026-02-01"})
    write(new, tmp_path / "a")
    write(old, tmp_path / "b")
    assert read_all([tmp_path / "a", tmp_path / "b"]) == [new]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "schema 99.*update"),
        ({"colour": "red"}, "unknown record fields: colour"),
        ({"bits": {"width": 4}}, "width"),
        ({"status": "fine"}, "status"),
    ],
)
def test_bad_records_are_refused_with_the_cause(tmp_path: Path, change: dict, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(to_dict(record()) | change))
    with pytest.raises(EdadmError, match=f"bad.json.*{message}"):
        read(path)


def test_a_missing_field_is_named() -> None:
    data = to_dict(record())
    del data["task"]
    with pytest.raises(EdadmError, match="lacks task"):
        from_dict(data)


def test_quantization_cost_counts_only_quantization_stages() -> None:
    one = record(
        stages={"ranges": Stage(2.0, 500.0), "reconstruction": Stage(None, None, True), "sampling": Stage(50.0, 900.0)}
    )
    assert one.quantization_seconds == 2.0
    assert one.quantization_peak_mib == 500.0
    assert record(stages={}).quantization_seconds is None


def test_the_load_beside_quantization_is_the_mean_over_its_seconds() -> None:
    one = record(
        stages={
            "ranges": Stage(1.0, other_load=0.0),
            "reconstruction": Stage(3.0, other_load=2.0),
            "sampling": Stage(50.0, other_load=8.0),
        }
    )
    assert one.quantization_other_load == 1.5
    assert from_dict(to_dict(one)) == one
    assert record(stages={"ranges": Stage(2.0, 500.0)}).quantization_other_load is None


def test_an_unwritable_results_folder_is_found_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdadmError, match="cannot write"):
        records.ensure_writable(tmp_path / "file" / "local")
    records.ensure_writable(tmp_path / "local")
    assert list((tmp_path / "local").iterdir()) == []


def test_provenance_is_json_and_names_what_matters() -> None:
    found = records.provenance("cpu")
    assert json.loads(json.dumps(found)) == found
    assert found["device"] == "cpu"
    assert found["libraries"]["torch"]
    assert found["date"].endswith("+00:00")
    assert found["command"]


def test_reading_records_does_not_import_torch() -> None:
    code = "import sys, edadm.records as r; r.provenance(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_records_are_typed_and_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        record().task = "other"  # type: ignore[misc]
    assert {"calibration", "reconstruction", "optimization", "ranges"} <= {f.name for f in dataclasses.fields(Record)}


def test_the_command_line_does_not_say_where_the_interpreter_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["/home/me/.venv/bin/python", "run.py", "method=rtn", "model.path=a b"])
    assert records.provenance()["command"] == "python run.py method=rtn 'model.path=a b'"

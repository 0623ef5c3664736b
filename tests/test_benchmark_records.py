"""What a benchmark leaves behind: its record, and the README's block."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import readme, records
from benchmarks.limits import PRODUCT
from benchmarks.operations import KNOWN, YARDSTICK
from benchmarks.records import Benchmark
from benchmarks.timing import Row
from edadm.errors import EdadmError
from edadm.records import read_all

SEARCH = "activation ranges, 64 rows in 4 batches"


def made(task: str = "golden", date: str = "2026-01-02T03:04:05+00:00", **changes) -> Benchmark:
    rows = [Row(SEARCH, (1.0, 2.0, 3.0), (0.1, 0.1, 0.1), KNOWN[SEARCH].official), Row(YARDSTICK, (4.6,), (0.1,))]
    found = records.benchmark(task, "Title.", "a pass", rows, torch.device("cpu"), 1, (0.25, 0.5, 1.0))
    return dataclasses.replace(found, provenance=found.provenance | {"date": date}, **changes)


def step(date: str = "2026-01-02T03:04:05+00:00") -> Benchmark:
    return made("cifar10_tiny", date, rows=(Row("step", (1.1, 1.2, 1.3), (1.0, 1.0, 1.0)),))


def test_a_record_survives_a_round_trip(tmp_path: Path):
    one = made(facts={"images per second": 3.0})
    path = records.write(one, tmp_path)
    assert path == tmp_path / "benchmarks" / "golden-2026-01-02T03-04-05.json"
    first = json.loads(path.read_text())["rows"][0]
    assert (first["ratio"], first["quartiles"], first["n"]) == (pytest.approx(20), pytest.approx([15, 25]), 3)
    assert {"commit", "dirty"} == one.provenance["git"].keys()
    again = records.read(path)
    assert again.rows == one.rows and again.facts == one.facts
    assert again.load[0] == (0.25, 0.5, 1.0) and len(again.load[1]) == 3
    assert "load 0.2 before" in again.machine and "1 thread," in again.machine


def test_the_newest_of_a_task_counts_and_older_ones_stay(tmp_path: Path):
    for date in ("2026-03-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"):
        records.write(made(date=date), tmp_path)
    records.write(made("cifar10_tiny", "2026-04-01T00:00:00+00:00"), tmp_path)
    path, found = records.newest(tmp_path, "golden")
    assert found.date.startswith("2026-03-01") and path.is_file()
    assert len(list((tmp_path / "benchmarks").iterdir())) == 3
    assert records.newest(tmp_path / "nothing", "golden") is None


def test_broken_records_are_named(tmp_path: Path):
    path = records.write(made(), tmp_path)
    data = json.loads(path.read_text())
    for text in ("nonsense", json.dumps(data | {"schema": 99}), json.dumps(data | {"rows": [{}]})):
        path.write_text(text)
        with pytest.raises(EdadmError, match=r"golden-2026.*holds no benchmark"):
            records.read(path)


def test_a_benchmark_beside_records_of_runs_is_no_broken_one(tmp_path: Path, caplog):
    records.write(made(), tmp_path)
    assert read_all([tmp_path]) == [] and not caplog.records


def test_the_block_holds_what_the_records_hold(tmp_path: Path):
    records.write(made(), tmp_path)
    records.write(step(), tmp_path)
    shares = {"step: arithmetic": 0.805, "step: rate": 0.5, "step: memory": 0.19, "step: dispatch": 0.005}
    records.write(made("limits", rows=(), facts={PRODUCT: 40.0} | shares), tmp_path)
    text = readme.block(tmp_path)
    assert f"| {SEARCH} | 20 [15, 25] | 3 | 215–360 |" in text.splitlines()
    assert "| step | 80% | 50% | 19% | 0% |" in text.splitlines() and "(40 GFLOP/s)" in text
    assert "loop for the TDAC scores costs 46 passes" in text.replace("\n", " ")
    assert "costs 1.2 [1.15, 1.25] full-precision steps (n=3)" in text.replace("\n", " ")
    assert "golden-2026-01-02T03-04-05.json" in text and f"| {YARDSTICK}" not in text
    assert max(map(len, text.splitlines())) <= 120


def test_without_records_the_block_says_what_makes_them(tmp_path: Path):
    records.write(made(), tmp_path)  # and none of the embedded task
    assert readme.COMMAND in readme.block(tmp_path)

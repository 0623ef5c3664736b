from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edadm import journal
from edadm.errors import EdadmError
from edadm.journal import announce_sweep, finish_run, read_run, read_runs, read_sweeps, start_run, update_run

HASH = "a" * 16


def test_a_run_announces_its_life(tmp_path: Path) -> None:
    start_run(tmp_path, HASH, "method=edadm", "demo")
    update_run(tmp_path, HASH, "calibration", {"trajectories": "b" * 16})
    update_run(tmp_path, HASH, "reconstruction", {"calibration": "c" * 16})
    run = read_run(tmp_path, HASH)
    assert run is not None
    assert (run.state, run.current_state, run.stage, run.sweep) == ("running", "running", "reconstruction", "demo")
    assert run.artefacts == {"trajectories": "b" * 16, "calibration": "c" * 16}
    assert run.pid == os.getpid()
    finish_run(tmp_path, HASH, "failed", "out of memory")
    [run] = read_runs(tmp_path)
    assert (run.current_state, run.error) == ("failed", "out of memory")


def test_a_sweep_is_read_back_in_order(tmp_path: Path) -> None:
    jobs = [("b" * 16, "method=rtn"), (HASH, "method=edadm")]
    announce_sweep(tmp_path, "2026-11-21/10:00 demo", jobs)
    [sweep] = read_sweeps(tmp_path)
    assert sweep.name == "2026-11-21/10:00 demo"
    assert sweep.jobs == tuple(jobs)


def test_a_run_whose_process_is_gone_was_killed(tmp_path: Path) -> None:
    code = f"from edadm.journal import start_run; start_run({str(tmp_path)!r}, {HASH!r}, 'x')"
    subprocess.run([sys.executable, "-c", code], check=True)
    run = read_run(tmp_path, HASH)
    assert run is not None
    assert (run.state, run.current_state) == ("running", "killed")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="start times of processes come from /proc")
def test_another_process_with_the_same_number_is_not_the_run(tmp_path: Path) -> None:
    start_run(tmp_path, HASH, "x")
    run = read_run(tmp_path, HASH)
    assert run is not None
    assert dataclasses.replace(run, process_start="1").current_state == "killed"


def test_a_stage_that_takes_long_shows_that_it_lives_now_and_then(tmp_path: Path) -> None:
    start_run(tmp_path, HASH, "x")
    update_run(tmp_path, HASH, "sampling")
    before = read_run(tmp_path, HASH)
    journal.show_life(tmp_path, HASH)
    assert read_run(tmp_path, HASH) == before
    path = tmp_path / ".runs" / f"{HASH}.json"
    os.utime(path, (0, time.time() - journal.SIGN_EVERY - 1))
    journal.show_life(tmp_path, HASH)
    after = read_run(tmp_path, HASH)
    assert before is not None and after is not None
    assert after.updated > before.updated and after.stage == "sampling"
    journal.show_life(tmp_path, "0" * 16)  # a run that is not announced has no journal
    assert read_run(tmp_path, "0" * 16) is None


def test_of_another_host_the_last_news_decide(tmp_path: Path) -> None:
    start_run(tmp_path, HASH, "x")
    run = read_run(tmp_path, HASH)
    assert run is not None
    elsewhere = dataclasses.replace(run, host="elsewhere", pid=1, process_start="1")
    assert elsewhere.current_state == "running"
    silent = dataclasses.replace(elsewhere, updated=time.time() - journal.SILENT_AFTER - 1)
    assert silent.current_state == "killed"


def test_broken_journals_are_ignored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    start_run(tmp_path, HASH, "x")
    (tmp_path / ".runs" / "broken.json").write_text("{")
    (tmp_path / ".runs" / "other.json").write_text(json.dumps({"colour": "red"}))
    with caplog.at_level(logging.WARNING):
        assert [run.hash for run in read_runs(tmp_path)] == [HASH]
    assert "broken.json" in caplog.text
    assert "other" in caplog.text


def test_a_run_does_not_fail_for_want_of_a_journal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        start_run(tmp_path / "file", HASH, "x")
        update_run(tmp_path / "file", HASH, "stage")
        finish_run(tmp_path / "file", HASH, "ok")
    assert "no journal" in caplog.text
    assert EdadmError.__name__ not in caplog.text

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edadm import results
from edadm.journal import announce_sweep, finish_run, read_run, start_run, update_run
from edadm.records import write
from edadm.results import Job, main, seconds_left
from edadm.store import Store
from tests.report.records_for_tests import record


def build(folder: Path) -> None:
    (folder / "data").write_bytes(b"x" * 1000)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


@pytest.fixture
def local(tmp_path: Path) -> Path:
    folder = tmp_path / "results" / "local"
    folder.mkdir(parents=True)
    return folder


def lines_of(capsys: pytest.CaptureFixture) -> list[str]:
    return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]


def test_status_tells_the_states_of_a_sweep(local: Path, capsys: pytest.CaptureFixture) -> None:
    runs = {name: record(name) for name in ("rtn", "edadm", "brecq", "qdiffusion", "ptq4dm")}
    announce_sweep(local, "demo", [(run.hash, f"method={name}") for name, run in runs.items()])
    start_run(local, runs["rtn"].hash, "method=rtn", "demo")
    finish_run(local, runs["rtn"].hash, "ok")
    write(runs["rtn"], local)
    start_run(local, runs["edadm"].hash, "method=edadm", "demo")
    update_run(local, runs["edadm"].hash, "reconstruction")
    start_run(local, runs["brecq"].hash, "method=brecq", "demo")
    finish_run(local, runs["brecq"].hash, "failed", "EdadmError: no such part")
    write(dataclasses.replace(runs["qdiffusion"], status="diverged", reason="NaN in mid"), local)
    assert main(["status", "demo", "--results", str(local)]) == 0
    lines = lines_of(capsys)
    assert lines[0] == "demo: 5 runs: 1 done, 1 running, 1 waiting, 1 diverged, 1 failed"
    assert lines[1].startswith("estimated end 20")
    assert f"done {runs['rtn'].hash[:8]} 0 s method=rtn" in lines
    assert f"running {runs['edadm'].hash[:8]} 0 s method=edadm" in lines
    assert lines[lines.index(f"running {runs['edadm'].hash[:8]} 0 s method=edadm") + 1] == "reconstruction"
    assert "EdadmError: no such part" in lines
    assert "NaN in mid" in lines
    assert f"waiting {runs['ptq4dm'].hash[:8]} method=ptq4dm" in lines


def test_status_without_sweeps_shows_single_runs(local: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["status", "--results", str(local)]) == 0
    assert "Nothing has been run" in capsys.readouterr().out
    start_run(local, "a" * 16, "method=edadm")
    assert main(["status", "--results", str(local)]) == 0
    lines = lines_of(capsys)
    assert lines[0] == "single runs: 1 runs: 1 running"
    assert lines[1] == "estimated end unknown until a run has finished"


def test_a_record_that_was_deleted_is_waiting_again(local: Path) -> None:
    start_run(local, "a" * 16, "method=edadm")
    finish_run(local, "a" * 16, "ok")
    run = read_run(local, "a" * 16)
    assert results._job("a" * 16, "method=edadm", None, run, 0.0).state == "waiting"


def test_an_unknown_sweep_lists_the_known(local: Path, capsys: pytest.CaptureFixture) -> None:
    announce_sweep(local, "demo", [])
    assert main(["status", "other", "--results", str(local)]) == 1
    assert "known: demo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ([("ok", 100.0), ("waiting", None), ("waiting", None)], 200.0),
        ([("ok", 100.0), ("running", 30.0)], 70.0),
        ([("ok", 100.0), ("running", 30.0), ("waiting", None)], 170.0),
        ([("ok", 100.0), ("running", 0.0), ("running", 50.0), ("waiting", None)], 125.0),
        ([("ok", 100.0), ("running", 500.0)], 0.0),
        ([("running", 30.0), ("waiting", None)], None),
        ([("ok", 100.0)], None),
    ],
)
def test_the_estimate_by_hand(states: list[tuple[str, float | None]], expected: float | None) -> None:
    jobs = [Job(str(index), "", state, seconds) for index, (state, seconds) in enumerate(states)]
    assert seconds_left(jobs) == expected


def test_gc_removes_what_no_record_needs_after_asking(
    store: Store, local: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = store.fetch("images", {"k": 1}, build, label="kept one")
    spare = store.fetch("images", {"k": 2}, build, label="spare one")
    write(record(artefacts={"images": needed.name}), local)
    command = ["gc", "--results", str(local.parent), "--cache", str(store.root)]
    monkeypatch.setattr("builtins.input", lambda question: "n")
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "spare one" in output
    assert "kept one" not in output
    assert spare.is_dir()
    monkeypatch.setattr("builtins.input", lambda question: "y")
    assert main(command) == 0
    assert needed.is_dir()
    assert not spare.exists()
    assert main(command) == 0
    assert "Every artefact is needed" in capsys.readouterr().out


def test_gc_without_a_terminal_removes_nothing_unless_yes(
    store: Store, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spare = store.fetch("images", {"k": 2}, build)
    command = ["gc", "--results", str(local), "--cache", str(store.root)]

    def no_terminal(question: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", no_terminal)
    assert main(command) == 0
    assert spare.is_dir()
    assert main([*command, "--yes"]) == 0
    assert not spare.exists()


def test_gc_keeps_what_an_unfinished_run_goes_on_from(store: Store, local: Path) -> None:
    shared = store.fetch("trajectories", {"k": 1}, build)
    (store.workspace("images", {"k": 2}) / "0.pt").write_text("chunk")
    start_run(local, "a" * 16, "method=edadm")
    update_run(local, "a" * 16, "images", {"trajectories": shared.name})
    command = ["gc", "--results", str(local.parent), "--cache", str(store.root), "--yes"]
    assert main(command) == 0
    assert (store.workspace("images", {"k": 2}) / "0.pt").exists()
    assert shared.is_dir()
    finish_run(local, "a" * 16, "ok")
    assert main([*command, "--partial"]) == 0
    assert store.artefacts() == []


def test_gc_refuses_to_run_where_there_are_no_records(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    kept = store.fetch("images", {"k": 1}, build)
    assert main(["gc", "--results", str(tmp_path / "nowhere"), "--cache", str(store.root), "--yes"]) == 1
    assert "everything would look unneeded" in capsys.readouterr().err
    assert kept.is_dir()


def test_push_wandb_sends_the_named_records_with_their_pictures(
    local: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    chosen = record(sweep="demo", outputs={"grid": "grid.png", "gone": "gone.png"})
    picture = write(chosen, local).with_name("grid.png")
    picture.write_bytes(b"png")
    write(record("rtn"), local)
    sent: list[tuple] = []
    monkeypatch.setattr(results, "push", lambda *words: sent.append(words))
    assert main(["push-wandb", "demo", "--results", str(local), "--mode", "offline"]) == 0
    assert sent == [(chosen, [picture], "offline")]
    assert main(["push-wandb", "--results", str(local)]) == 0
    assert len(sent) == 3
    assert main(["push-wandb", "other", "--results", str(local)]) == 1
    assert "no record of other" in capsys.readouterr().err

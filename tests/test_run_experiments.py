"""Experiments as typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from edadm import records, results
from tests.e2e.toy_task import words
from tests.test_run import Here, here, model

__all__ = ["here", "model"]


def test_an_axis_narrowed_to_no_row_runs_nothing(tmp_path: Path, here: Here) -> None:
    line = ["experiments=table6_ablation", "calibration=normal", f"results={tmp_path / 'results'}"]
    code, _, error = here(tmp_path / "cache", *line)
    assert code == 2
    assert "no row of table6_ablation at scale=tiny asks for calibration=normal" in error and "Traceback" not in error
    assert not (tmp_path / "results").exists()


@pytest.mark.slow
def test_an_experiment_drops_what_no_row_asks_for_and_finds_what_is_there(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], here: Here
) -> None:
    axes = ["experiments=table1_cifar10", "method=rtn,adaround", "bits=w4a4", "seed=0"]
    line = [*axes, *words(model, tmp_path / "first")[1:]]  # the task is an axis of the experiment
    code, out, error = here(tmp_path / "cache", "-m", *line)
    assert code == 0, error
    assert "adaround" not in out + error  # Table I has it at W4A8 only
    assert "Beside the paper: python -m edadm.report table1_cifar10" in out
    (run,) = [record for record in records.read_all([tmp_path / "first"]) if not record.is_fp]
    assert (run.method, run.bits.name) == ("rtn", "w4a4")
    assert not [word for word in run.overrides if word.startswith(("experiments", "scale"))]
    assert results.main(["status", "--results", str(tmp_path / "first")]) == 0
    assert "1 runs: 1 done" in capsys.readouterr().out

    again = [word for word in line if not word.startswith("results=")]
    again += [f"results={tmp_path / 'second'}", f"reference={tmp_path / 'first'}"]
    code, out, error = here(tmp_path / "other_cache", "-m", *again)
    assert code == 0, error
    assert f"{run.hash}.json is there, nothing is computed" in error
    assert not list((tmp_path / "second").glob("cifar10_tiny/*.json"))

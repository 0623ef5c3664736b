from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edadm import journal
from edadm.comparison import write_draws
from edadm.records import write
from edadm.report.__main__ import main
from tests.report.records_for_tests import fp, record, resampled


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for one in (fp(), record(sweep="first"), record("rtn", sweep="second")):
        write(one, tmp_path / "local")
    return tmp_path / "local"


def test_the_terminal_gets_markdown(results: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["--results", str(results)]) == 0
    output = capsys.readouterr().out
    assert output.startswith("## toy, W4A8")
    assert "| rtn " in output


def test_an_experiment_is_a_sweep_with_its_full_precision_row(results: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["first", "--results", str(results)]) == 0
    output = capsys.readouterr().out
    assert "| FP " in output
    assert "| edadm " in output
    assert "| rtn " not in output


def test_runs_of_a_sweep_without_a_record_are_listed(results: Path, capsys: pytest.CaptureFixture) -> None:
    journal.announce_sweep(results, "third", [(record().hash, "method=edadm"), ("f" * 16, "method=brecq bits=w4a8")])
    assert main(["third", "--results", str(results)]) == 0
    output = capsys.readouterr().out
    assert "| edadm " in output
    assert "- Not run yet: `python run.py method=brecq bits=w4a8`" in output


@pytest.mark.parametrize(("style", "suffix"), [("csv", "csv"), ("latex", "tex"), ("html", "html")])
def test_other_formats_go_to_a_file(results: Path, style: str, suffix: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["first", "--results", str(results), "--format", style, "--out", str(results / "out")]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == results / "out" / f"first.{suffix}"
    assert "edadm" in path.read_text()


def test_html_embeds_the_curves(results: Path) -> None:
    write(record(seed=3, metrics={"sqnr_per_step": {"values": [1.0, 2.0], "n": 4}}), results)
    assert main(["--results", str(results), "--format", "html"]) == 0
    assert "data:image/png;base64," in (results / "report" / "report.html").read_text()


def test_two_records_are_compared(results: Path, capsys: pytest.CaptureFixture) -> None:
    a, b = record(sweep="first").hash, record("rtn").hash
    assert main(["--results", str(results), "--diff", a[:10], b]) == 0
    assert "| method " in capsys.readouterr().out


def test_verdicts_and_wins_come_from_records_and_draws(results: Path, capsys: pytest.CaptureFixture) -> None:
    runs = [
        record(method, seed, fd=fd + seed / 10, task="cifar10_tiny")
        for method, fd in (("edadm", 10.0), ("qdiffusion", 20.0))
        for seed in range(3)
    ]
    for run in runs:
        write(run, results)
    for draws in resampled(runs).values():
        write_draws(draws, results)
    assert main(["--results", str(results), "--verdicts"]) == 0
    output = capsys.readouterr().out
    assert "| I-1: EDA-DM is better than Q-Diffusion at W4A8 | Table I, FID | supported |" in " ".join(output.split())
    assert "1 supported, 0 contradicted" in output
    assert main(["--results", str(results), "--ranks"]) == 0
    assert "| fd_tiny | edadm | 4 | 3 | 1 | 0 |" in " ".join(capsys.readouterr().out.split())
    assert main(["--results", str(results), "--verdicts", "--format", "csv"]) == 0
    text = Path(capsys.readouterr().out.strip()).read_text()
    assert text.startswith("claim,source,statement,metric,verdict") and "not available yet" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--results", "/nonexistent"], "no results folder /nonexistent"),
        (["fourth"], "experiments here: first, second"),
        (["--diff", "zz", "zz"], "no record 'zz'"),
    ],
)
def test_impossible_requests_exit_with_one_and_say_why(
    results: Path, words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["--results", str(results), *words] if "--results" not in words else words) == 1
    assert message in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_explained(results: Path, capsys: pytest.CaptureFixture) -> None:
    (results / "file").write_text("")
    assert main(["--results", str(results), "--format", "csv", "--out", str(results / "file" / "x")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_the_module_runs_without_torch(results: Path) -> None:
    code = (
        "import sys, edadm.report.__main__ as m; code = m.main(sys.argv[1:]); "
        "print('torch' in sys.modules or 'matplotlib' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--results", str(results)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"

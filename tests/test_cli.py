from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edadm import cli, config, experiment, records
from edadm.errors import Diverged, EdadmError
from edadm.keys import Run
from tests.e2e.conftest import toy, toy_model
from tests.e2e.toy_task import words

__all__ = ["toy", "toy_model"]

Go = Callable[..., tuple[cli.Outcome, int]]


@pytest.fixture
def go(toy: Callable[..., Run], toy_model: Path, tmp_path: Path) -> Go:
    """Run words of the command line as a job, alone or in a sweep."""

    def run(*more: str, sweep: str | None = None) -> tuple[cli.Outcome, int]:
        line = words(toy_model, tmp_path / "results", *more)
        return cli._guarded(config.compose(line), line, sweep)

    return run


def raising(error: BaseException) -> Callable[..., Path]:
    def execute(run: Run) -> Path:
        raise error

    return execute


def test_a_diverged_run_has_a_record_and_its_exit_code(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "execute", raising(Diverged("loss of conv_in is nan in iteration 3")))
    outcome, code = go("method=edadm")
    assert (outcome.status, code) == ("diverged", cli.FAILED)
    assert outcome.record is not None
    assert records.read(Path(outcome.record)).reason == "loss of conv_in is nan in iteration 3"


def test_an_absurd_learning_rate_diverges_naming_unit_and_iteration(go: Go, capsys: pytest.CaptureFixture[str]) -> None:
    outcome, _ = go("method=edadm", "recipe.lr_act=1e38", "recipe.lr_weight=1e38", "profile.iterations=8")
    assert outcome.status == "diverged"
    assert "iteration" in capsys.readouterr().err


def test_an_unexpected_error_keeps_the_end_of_its_traceback(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "execute", raising(RuntimeError("broken part")))
    outcome, code = go("method=rtn")
    assert (outcome.status, code) == ("failed", cli.FAILED)
    assert outcome.reason is not None
    assert outcome.reason.startswith("RuntimeError: broken part\n") and "raise error" in outcome.reason


def test_a_mistake_of_the_user_is_a_message_without_a_record(go: Go, capsys: pytest.CaptureFixture[str]) -> None:
    outcome, code = go("bits.weight=9")
    assert (outcome.record, code) == (None, cli.REFUSED)
    assert capsys.readouterr().err.startswith("failed: bits.weight=9: choose 2 to 8")


def test_an_error_while_running_leaves_a_failed_record(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "execute", raising(EdadmError("the disk is full")))
    outcome, code = go("method=rtn")
    assert code == cli.REFUSED
    assert records.read(Path(str(outcome.record))).status == "failed"


def test_a_pair_without_a_task_is_skipped_in_a_sweep_and_refused_alone(go: Go, monkeypatch: pytest.MonkeyPatch) -> None:
    def skip(*args: object) -> None:
        raise config.Skipped("no task pairs them")

    monkeypatch.setattr(config, "settings", skip)
    assert go("method=rtn", sweep="sweep")[1] == cli.OK
    outcome, code = go("method=rtn")
    assert (outcome.status, code) == ("skipped", cli.REFUSED)


def test_sites_stop_before_anything_is_computed(go: Go, capsys: pytest.CaptureFixture[str]) -> None:
    outcome, code = go("method=rtn", "sites=true")
    assert (outcome.status, outcome.record, code) == ("ok", None, cli.OK)
    assert "conv_in.weight_quantizer" in capsys.readouterr().out

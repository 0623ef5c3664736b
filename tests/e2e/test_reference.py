"""Records of other results sets that count as made."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from edadm import experiment, stages
from edadm.keys import Run

Toy = Callable[..., Run]


def test_a_run_with_a_reference_record_is_not_made_again(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = experiment.execute(toy("method=rtn", f"results={tmp_path / 'reference'}"))
    again = toy("method=rtn", f"results={tmp_path / 'local'}", f"reference={tmp_path / 'reference'}")
    monkeypatch.setattr(stages, "stage", lambda *args, **kwargs: pytest.fail("a stage was looked at"))
    with caplog.at_level(logging.INFO):
        assert experiment.execute(again) == path
    assert f"record {path} is there, nothing is computed" in caplog.text
    assert not list((tmp_path / "local").rglob("*.json"))


def test_without_a_reference_the_run_is_made_again(toy: Toy, tmp_path: Path) -> None:
    path = experiment.execute(toy("method=rtn", f"results={tmp_path / 'reference'}"))
    again = experiment.execute(toy("method=rtn", f"results={tmp_path / 'local'}", "reference=null"))
    assert again != path and again.is_file()


def test_a_failed_record_is_no_reference(toy: Toy, tmp_path: Path) -> None:
    failed = experiment.record_failure(toy("method=rtn", f"results={tmp_path / 'reference'}"), "failed", "disk")
    again = toy("method=rtn", f"results={tmp_path / 'local'}", f"reference={tmp_path / 'reference'}")
    assert experiment.execute(again) != failed


def test_where_the_reference_is_does_not_change_the_hash(toy: Toy, tmp_path: Path) -> None:
    assert toy("method=rtn", f"reference={tmp_path}").hash == toy("method=rtn").hash

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest

from edadm.diagnostics.files import (
    Diagnostic,
    diagnostic_path,
    find_diagnostic,
    read_diagnostics,
    write_diagnostic,
)
from edadm.records import read_all, write
from tests.report.records_for_tests import record


def made(name: str = "scores", run: str = "a" * 16, version: int = 1, **values: object) -> Diagnostic:
    return Diagnostic(name, version, run, "toy", {"n": {"rows": 3}, "unit": {}} | values, 1.5, {"date": "2026"})


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    first = made(curve=[1.0, 2.5])
    assert write_diagnostic(first, tmp_path) == tmp_path / "toy" / "diagnostics" / f"{'a' * 16}-scores.json"
    assert read_diagnostics([tmp_path]) == [first]


def test_numbers_that_json_lacks_become_null_and_floats_keep_six_digits(tmp_path: Path) -> None:
    write_diagnostic(made(curve=[math.nan, math.inf, 1 / 3]), tmp_path)
    assert read_diagnostics([tmp_path])[0].values["curve"] == [None, None, 0.333333]


def test_names_are_told_apart(tmp_path: Path) -> None:
    for name in ("scores", "soft_rounding"):
        write_diagnostic(made(name), tmp_path)
    assert [found.name for found in read_diagnostics([tmp_path], "soft_rounding")] == ["soft_rounding"]
    assert len(read_diagnostics([tmp_path])) == 2


def test_only_the_version_asked_for_is_found(tmp_path: Path) -> None:
    path = write_diagnostic(made(version=1), tmp_path)
    assert find_diagnostic([tmp_path / "none", tmp_path], "toy", "a" * 16, "scores", 1) == path
    assert find_diagnostic([tmp_path / "none", tmp_path], "toy", "a" * 16, "scores", 2) is None
    assert find_diagnostic([tmp_path / "none", tmp_path], "toy", "b" * 16, "scores", 1) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 99}', '{"name": "scores"}'])
def test_a_broken_file_is_skipped_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    path = diagnostic_path(tmp_path, "toy", "c" * 16, "scores")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert read_diagnostics([tmp_path]) == []
    assert path.name in caplog.text


def test_readers_of_records_pass_over_diagnostics(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = record()
    write(run, tmp_path)
    write_diagnostic(made(run=run.hash), tmp_path)
    with caplog.at_level(logging.WARNING):
        assert [found.hash for found in read_all([tmp_path])] == [run.hash]
    assert not caplog.text

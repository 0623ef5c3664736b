"""The command line as typed.

A process of its own imports torch anew for many seconds: `call` is for what only one shows, `here` for the rest.
"""

from __future__ import annotations

import logging
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edadm import records
from tests.conftest import ROOT
from tests.e2e.toy_task import words
from tests.toys import tiny_unet


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_unet().save_pretrained(folder)
    return folder


def start(cache: Path, *line: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "EDADM_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *line],
        cwd=cache.parent, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def call(cache: Path, *line: str) -> tuple[int, str, str]:
    process = start(cache, *line)
    out, error = process.communicate(timeout=600)
    return process.returncode, out, error


@contextmanager
def logging_as_before() -> Iterator[None]:
    """Undo what Hydra configures: its handlers write to streams that capsys closes, and its levels hide messages."""

    def loggers() -> list[logging.Logger]:
        return [item for item in logging.root.manager.loggerDict.values() if isinstance(item, logging.Logger)]

    handlers, levels = logging.root.handlers[:], {logger: logger.level for logger in [logging.root, *loggers()]}
    try:
        yield
    finally:
        for handler in logging.root.handlers:
            if handler not in handlers:
                handler.close()
        logging.root.handlers[:] = handlers
        for logger in [logging.root, *loggers()]:
            logger.setLevel(levels.get(logger, logging.NOTSET))


Here = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """`call` in this process."""

    def run(cache: Path, *line: str) -> tuple[int, str, str]:
        code = 0
        capsys.readouterr()
        with logging_as_before(), monkeypatch.context() as patch:
            patch.setenv("EDADM_CACHE", str(cache))
            patch.setenv("EDADM_ROOT", str(ROOT))
            patch.chdir(cache.parent)
            patch.setattr(sys, "argv", [str(ROOT / "run.py"), *line])
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as end:
                assert isinstance(end.code, int), end.code
                code = end.code
        return code, *capsys.readouterr()

    return run


def test_help_shows_groups_parts_and_examples(tmp_path: Path, here: Here) -> None:
    code, out, _ = here(tmp_path / "cache", "--help")
    assert code == 0
    for text in (
        "python run.py -m method=edadm,qdiffusion",
        "bits: w32a32",
        "calibration: normal",
        "save_calibration_set",
    ):
        assert text in out


def test_the_configuration_is_shown_resolved(tmp_path: Path, here: Here) -> None:
    code, out, _ = here(tmp_path / "cache", "--cfg", "job", "--resolve", "method=qdiffusion")
    assert code == 0
    assert "iterations_weight: 160" in out


@pytest.mark.parametrize(
    ("word", "choice"), [("method=nope", "qdiffusion"), ("bits=w9a9", "w4a8"), ("task=nope", "cifar10")]
)
def test_an_unknown_name_lists_the_choices(tmp_path: Path, here: Here, word: str, choice: str) -> None:
    code, _, error = here(tmp_path / "cache", word)
    assert code != 0
    assert choice in error and "Traceback" not in error


def test_an_impossible_value_is_a_message_and_exit_code_2(tmp_path: Path) -> None:
    code, _, error = call(tmp_path / "cache", "bits.weight=9")
    assert code == 2
    assert "bits.weight=9: choose 2 to 8" in error and "Traceback" not in error


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_failed_job_and_prints_its_table(tmp_path: Path, model: Path, here: Here) -> None:
    line = words(model, tmp_path / "results", "method=rtn,qdiffusion", "bits.weight=4,9")
    code, out, error = here(tmp_path / "cache", "-m", *line)
    assert code == 1
    rows = [row.split()[1] for row in out.splitlines() if row.startswith("|")]
    assert rows[2:] == ["FP", "qdiffusion", "rtn"]
    assert error.count("bits.weight=9: choose 2 to 8") == 4  # when it happens and at the end, for two jobs
    assert "Traceback" not in error
    assert list((tmp_path / "results").glob("*.png")), "the curve of the sweep"
    assert not (tmp_path / "outputs").exists() and not (tmp_path / "multirun").exists()


@pytest.mark.slow
def test_a_sweep_killed_by_the_system_ends_with_the_numbers_of_an_undisturbed_one(
    tmp_path: Path, model: Path, here: Here
) -> None:
    def line(results: str) -> list[str]:
        return ["-m", *words(model, tmp_path / results, "method=rtn,edadm", "profile.iterations=10")]

    assert here(tmp_path / "whole", *line("undisturbed"))[0] == 0
    process = start(tmp_path / "killed", *line("killed_results"))
    while (
        len(list((tmp_path / "killed" / "quantized").glob("*.partial/scratch/units/[!.]*"))) < 4
        and process.poll() is None
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert call(tmp_path / "killed", *line("killed_results"))[0] == 0
    whole, resumed = (
        {
            r.hash: {name: m.get("value", m.get("values")) for name, m in r.metrics.items()}
            for r in records.read_all([folder])
        }
        for folder in (tmp_path / "undisturbed", tmp_path / "killed_results")
    )
    assert len(whole) == 3
    assert resumed == whole

from __future__ import annotations

import logging
import mmap
from pathlib import Path
from types import SimpleNamespace

import pytest

from edadm import progress
from edadm.progress import Meter, Progress, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (125, "2 min 05 s"),
        (4800, "1 h 20 min"),
        (499e6, "5,775 days"),
    ],
)
def test_durations_read_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_name_stage_run_and_the_time_that_remains(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    with caplog.at_level(logging.INFO), Progress("edadm w4a8") as show:
        show("sampling", 10, 40)
        started = show._started
        monkeypatch.setattr(progress.time, "monotonic", lambda: started + 20)
        show("sampling", 20, 40)
    assert caplog.messages[-1] == "sampling [edadm w4a8]: 20 of 40, about 40 s left"


def test_what_was_finished_before_the_first_call_does_not_enter_the_estimate() -> None:
    show = Progress("rtn")
    show("reconstruction", 90, 100)
    assert show.line(95, 100, elapsed=10.0).endswith("about 10 s left")


def test_no_line_for_a_short_stage(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), Progress("rtn") as show:
        for done in range(5):
            show("sampling", done, 5)
    assert not caplog.messages


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "BAR_AFTER", 0.0)
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with Progress("rtn w4a8") as show:
        show("sampling", 1, 4)
        show("sampling", 2, 4)
    assert "sampling [rtn w4a8]" in capsys.readouterr().err


def test_seconds_of_a_killed_attempt_count(tmp_path: Path) -> None:
    memo = tmp_path / "elapsed"
    memo.write_text("100.0")
    with Meter(memo=memo) as meter:
        meter.note()
    assert 100 <= meter.seconds < 110


def test_a_note_that_a_kill_cut_short_counts_as_nothing(tmp_path: Path) -> None:
    memo = tmp_path / "elapsed"
    memo.write_text("")
    with Meter(memo=memo) as meter:
        pass
    assert meter.seconds < 10


def test_the_other_load_is_the_work_of_all_processes_but_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([50.0, 54.0])
    machine = iter([SimpleNamespace(user=10.0, system=1.0), SimpleNamespace(user=19.0, system=3.0)])
    own = iter([SimpleNamespace(user=3.0, system=0.5), SimpleNamespace(user=7.0, system=1.5)])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(progress.psutil, "cpu_times", lambda: next(machine))
    monkeypatch.setattr(progress.psutil, "Process", lambda: SimpleNamespace(cpu_times=lambda: next(own)))
    with Meter() as meter:
        pass
    assert meter.seconds == 4.0
    assert meter.other_load == 1.5  # 11 seconds of work in 4, 5 of them our own


def test_the_peak_is_that_of_the_stage_not_of_the_process() -> None:
    with Meter() as large, mmap.mmap(-1, 200 * 2**20) as block:  # a mapping: malloc may take what it has kept
        for page in range(0, len(block), 4096):
            block[page] = 1
    with Meter() as small:
        pass
    assert large.peak_memory_mib is not None and small.peak_memory_mib is not None
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of a stage needs Linux")
    assert large.peak_memory_mib - small.peak_memory_mib > 150

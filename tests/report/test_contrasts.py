from __future__ import annotations

import pytest

from edadm.records import Record
from edadm.report.contrasts import contrasts_of, mean_of, winner
from tests.report.records_for_tests import fp, record, resampled

Rows = dict[str, dict[int, Record]]


def rows(**values: list[float]) -> Rows:
    return {name: {seed: record(name, seed, fd=fd) for seed, fd in enumerate(found)} for name, found in values.items()}


def draws(found: Rows, *more: Record, spread: float = 0.1):
    return resampled([*(run for runs in found.values() for run in runs.values()), *more], spread)


def test_every_row_is_compared_with_the_reference_and_full_precision() -> None:
    found, full = rows(edadm=[10.0, 12.0], rtn=[13.0, 14.0]), fp(5.0)
    to_edadm, to_fp = contrasts_of(found, {0: full}, ["fd_tiny", "sqnr"], draws(found, full))
    assert (to_edadm.to, to_fp.to) == ("edadm", "FP")
    [(label, (fd_tiny, sqnr))] = to_edadm.rows
    assert (label, fd_tiny.value, sqnr.value) == ("rtn", pytest.approx(2.5), pytest.approx(0.0))
    assert [found[0].value for _, found in to_fp.rows] == pytest.approx([6.0, 8.5])


def test_what_is_not_known_is_left_out() -> None:
    found = rows(edadm=[10.0], rtn=[13.0])
    assert contrasts_of(found, {}, ["fd_tiny"], {}) == ()
    [contrast] = contrasts_of(found, {}, ["fd_tiny"], draws(found))
    assert contrast.to == "edadm"
    assert contrasts_of(rows(brecq=[10.0], rtn=[13.0]), {}, ["fd_tiny"], draws(found)) == ()


@pytest.mark.parametrize(("higher", "expected"), [(False, "edadm"), (True, "rtn"), (None, None)])
def test_the_winner_follows_the_direction(higher: bool | None, expected: str | None) -> None:
    found = rows(edadm=[10.0, 10.1, 10.2], brecq=[20.0, 20.1, 20.2], rtn=[30.0, 30.1, 30.2])
    assert winner(found, "fd_tiny", higher, draws(found)) == expected


def test_a_winner_is_told_from_all_others_by_three_seeds() -> None:
    close = rows(edadm=[10.0, 11.0, 12.0], brecq=[10.5, 11.0, 12.5], rtn=[40.0, 41.0, 42.0])
    assert winner(close, "fd_tiny", False, draws(close)) is None
    few = rows(edadm=[10.0, 10.0], rtn=[30.0, 30.0])
    assert winner(few, "fd_tiny", False, draws(few)) is None
    alone = rows(edadm=[10.0, 10.0, 10.0])
    assert winner(alone, "fd_tiny", False, draws(alone)) is None


def test_means_are_over_the_seeds_that_have_the_metric() -> None:
    runs = {0: record(fd=1.0), 1: record(seed=1, fd=None), 2: record(seed=2, fd=4.0)}
    assert mean_of(runs, "fd_tiny") == 2.5

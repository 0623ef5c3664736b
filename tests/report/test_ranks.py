from __future__ import annotations

from edadm.records import Record
from edadm.report.ranks import Standing, no_contest, rank_lines, rank_sheets, ranks
from edadm.report.sheet import markdown
from tests.report.records_for_tests import fp, record, resampled


def standings(records: list[Record], spread: float = 0.1, metric: str = "fd_tiny") -> dict[str, tuple[int, ...]]:
    """Contests, won, undecided and lost by method."""
    found = [one for one in ranks(records, resampled(records, spread)) if one.metric == metric]
    return {one.method: (one.contests, one.won, one.undecided, one.lost) for one in found}


def test_a_contest_is_a_task_bit_width_and_seed() -> None:
    records = [
        fp(),
        *(record("edadm", seed, fd=10.0, bits=bits) for seed in range(2) for bits in ("w4a8", "w8a8")),
        *(record("rtn", seed, fd=20.0, bits=bits) for seed in range(2) for bits in ("w4a8", "w8a8")),
        record("edadm", fd=10.0, task="other"),
        record("rtn", fd=5.0, task="other"),
    ]
    assert standings(records) == {"edadm": (5, 4, 0, 1), "rtn": (5, 1, 0, 4)}


def test_those_that_are_not_told_from_the_best_share_an_undecided_contest() -> None:
    records = [record("edadm", fd=10.0), record("brecq", fd=10.05), record("rtn", fd=20.0)]
    assert standings(records) == {"edadm": (1, 0, 1, 0), "brecq": (1, 0, 1, 0), "rtn": (1, 0, 0, 1)}
    assert standings(records, spread=50.0) == dict.fromkeys(("edadm", "brecq", "rtn"), (1, 0, 1, 0))


def test_higher_can_be_better() -> None:
    records = [record("edadm", sqnr=18.0), record("rtn", sqnr=25.0)]
    assert standings(records, metric="sqnr") == {"edadm": (1, 0, 0, 1), "rtn": (1, 1, 0, 0)}


def test_runs_that_were_not_resampled_decide_nothing() -> None:
    records = [record("edadm", fd=10.0), record("rtn", fd=20.0)]
    found = [one for one in ranks(records, {}) if one.metric == "fd_tiny"]
    assert [(one.won, one.undecided) for one in found] == [(0, 1), (0, 1)]


def test_ablations_the_demo_and_methods_without_a_rival_take_no_part() -> None:
    demo = {"profile": "demo", "n_images": 256}
    records = [
        record("edadm", fd=10.0),
        record("edadm", fd=5.0, variant={"calibration": "random"}, config={"calibration": "random"}),
        record("edadm", fd=5.0, config={"scope": {"matmuls": False}}),
        record("edadm", fd=5.0, config={"calibration_set": "rows.safetensors"}),
        *(record(method, fd=10.0, **demo) for method in ("edadm", "rtn")),
        record("rtn", status="failed", reason="x", metrics={}),
        record("brecq", fd=20.0, config={"load": "folder"}),
    ]
    assert standings(records) == {}


def test_without_a_contest_the_reason_is_told() -> None:
    demo = {"profile": "demo", "n_images": 256}
    assert no_contest([]).heading == "no contest: no finished run of a quantized model"
    assert no_contest([fp(), record(**demo)]).heading.startswith("no contest: the demo profile takes no part")
    assert no_contest([record()]).heading.startswith("no contest: no two methods as published")


def test_presets_are_counted_apart_and_methods_with_most_wins_come_first() -> None:
    records = [
        record(method, fd=fd, preset=preset, config={"preset": preset})
        for preset in ("paper", "released")
        for method, fd in (("rtn", 20.0), ("edadm", 10.0))
    ]
    found = ranks(records, resampled(records))
    assert found[0] == Standing("reference", 2048, "full", "paper", "fd_tiny", "edadm", 1, 1, 0, 0)
    sheets = rank_sheets(found)
    assert [sheet.heading for sheet in sheets] == [
        "wins, profile reference, scope full, preset paper, n=2048",
        "wins, profile reference, scope full, preset released, n=2048",
    ]
    assert "| fd_tiny |  edadm |        1 |   1 |         0 |    0 |" in markdown(sheets)
    assert rank_lines(found)[0]["won"] == 1

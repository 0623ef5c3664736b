from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from edadm.comparison import Difference, Draws
from edadm.records import Record
from edadm.report import paper_verdicts as verdicts
from edadm.report.experiment_file import Experiment, Row, load
from edadm.report.paper import Cell
from edadm.report.paper_rows import Found, find_rows
from tests.report.paper_records import COST, draws_of, run_of, scored
from tests.report.records_for_tests import metric

TINY, PAPER = load("table6_ablation"), load("table6_ablation", "paper")


def effect(value: float, seeds: int = 3, image_error: float = 0.01, seed_deviation: float | None = 0.01) -> Difference:
    return Difference(value, 2000, tuple(range(seeds)), image_error, seed_deviation, 0.0, 1.0, 200)


def ablation(distances: Mapping[int, list[float]]) -> tuple[list[Record], dict[str, Draws]]:
    """Records of rows of Table VI by the distance of each seed, and their draws."""
    runs = [run_of(TINY.rows[i], seed, scored(fd)) for i, found in distances.items() for seed, fd in enumerate(found)]
    return runs, {run.hash: draws_of(run, spread=0.001) for run in runs}


def compared(
    experiment: Experiment, runs: list[Record], draws: Mapping[str, Draws], name: str = "FID"
) -> dict[str, Any]:
    rows, _ = find_rows(experiment, runs)
    (found,) = [one for one in verdicts.compare(experiment, rows, draws) if one.name == name]
    return {one.found.row.paper["method"]: one for one in found.rows}


@pytest.mark.parametrize(
    ("printed", "found", "verdict"),
    [
        (-1.0, effect(-0.5), "same direction"),
        (-1.0, effect(0.5), "opposite direction"),
        (-1.0, effect(-0.01), "undecided at n=2000, 3 seeds"),
        (-1.0, effect(-0.5, seeds=1, seed_deviation=None), "undecided at n=2000, 1 seed"),
        (-1.0, effect(-0.5, seeds=2), "undecided at n=2000, 2 seeds"),
        (0.0, effect(-0.5), "undecided at n=2000, 3 seeds"),
        (-1.0, None, "undecided: no interval"),
        (None, effect(-0.5), "–"),
        (-0.46, -0.2, "same direction"),  # costs have no error
        (0.0, 0.0, "same direction"),
        (0.0, 0.3, "opposite direction"),
    ],
)
def test_only_a_sign_that_images_and_seeds_support_is_a_direction(printed: Any, found: Any, verdict: str) -> None:
    assert verdicts.direction_verdict(printed, found, has_reference=True) == verdict


def test_an_effect_needs_its_reference_row() -> None:
    assert verdicts.direction_verdict(-1.0, None, has_reference=False) == "–"


def test_effects_are_differences_to_the_reference_row_in_print_and_here() -> None:
    runs, draws = ablation({0: [1.0, 1.1, 1.2], 1: [0.5, 0.6, 0.7], 2: [1.5, 1.6, 1.7]})
    found = compared(TINY, runs, draws)
    assert found["baseline"].verdict == "reference row"
    assert found["+TDAC"].printed_effect == pytest.approx(10.75 - 16.23)
    assert found["+TDAC"].effect.value == pytest.approx(-0.5)
    assert (found["+TDAC"].mean, found["+TDAC"].std, found["+TDAC"].n) == (pytest.approx(0.6), pytest.approx(0.1), 2000)
    assert found["+TDAC"].verdict == "same direction"
    assert found["+FBR"].verdict == "opposite direction"
    assert found["+TDAC+FBR"].verdict == "not run"


def test_one_seed_decides_nothing() -> None:
    runs, draws = ablation({0: [1.0], 1: [0.5]})
    assert compared(TINY, runs, draws)["+TDAC"].verdict == "undecided at n=2000, 1 seed"


def test_without_resampled_images_there_is_no_interval() -> None:
    runs, _ = ablation({0: [1.0, 1.1, 1.2], 1: [0.5, 0.6, 0.7]})
    assert compared(TINY, runs, {})["+TDAC"].verdict == "undecided: no interval"


def test_a_metric_that_no_record_has_is_not_measured() -> None:
    runs, draws = ablation({1: [1.0]})
    found = compared(TINY, runs, draws, "IS")
    assert (found["+TDAC"].verdict, found["+FBR"].verdict) == ("not measured", "not run")


def test_how_a_run_failed_is_its_verdict() -> None:
    failed = run_of(TINY.rows[1], status="skipped", reason="no such pair\nmore")
    assert compared(TINY, [failed], {})["+TDAC"].verdict == "skipped: no such pair"


def test_a_row_that_cannot_run_yet_keeps_its_printed_number() -> None:
    found = compared(PAPER, [], {})["+TDAC"]
    assert found.verdict.startswith("not available yet: ") or found.verdict == "not run"
    assert found.printed is not None and found.printed.number == 10.75


def level(
    ours: float,
    n: int | None = 50000,
    printed: str = "10.00",
    name: str = "fid",
    drawn: float | None = None,
    seeds: int = 3,
) -> str:
    """The verdict on a printed 10.00, whose full precision is 9.00; drawn: our difference to it by the draws."""
    cell = Cell("I", "1", "task", "EDA-DM", "W4A8", name, printed, "50000", "")
    fp = Cell("I", "0", "task", "FP", "", name, "9.00", "50000", "")
    run = run_of(TINY.rows[0], metrics={name: metric(ours, n=50000)})
    one = verdicts.Compared(Found(Row({}, {}, (0,)), {0: run}), cell, "", mean=ours, n=n)
    return verdicts.level_verdict(one, name, fp, drawn and effect(drawn, seeds=seeds))


@pytest.mark.parametrize(
    ("ours", "more", "verdict"),
    [
        (10.5, {}, "reproduced"),  # 5 %
        (9.5, {}, "reproduced"),
        (10.51, {}, "undecided: no interval of the difference to FP"),
        (10.01, {"name": "is"}, "undecided: no interval of the difference to FP"),  # the tolerance is for distances
        (10.51, {"name": "is", "drawn": 1.0}, "reproduced"),  # the printed difference to full precision is 1.00
        (10.51, {"name": "sfid", "drawn": 2.0}, "differs"),
        (10.49, {"name": "sfid"}, "reproduced"),
        (12.0, {"drawn": 1.0}, "reproduced"),
        (12.0, {"drawn": 2.0, "seeds": 2}, "undecided: needs 3 seeds"),
        (12.0, {"drawn": 1.0, "seeds": 1}, "undecided: needs 3 seeds"),
        (10.5, {"drawn": 2.0, "seeds": 1}, "reproduced"),  # the tolerance needs none
        (10.004, {"name": "ModelSize_MB", "n": None}, "reproduced"),
        (10.01, {"name": "ModelSize_MB", "n": None}, "differs"),
        (10.0, {"n": 2000}, "undecided at n=2000: printed for n=50000"),
        (10.0, {"n": None}, "undecided at n=None: printed for n=50000"),
        (10.0, {"printed": "-"}, "–"),
    ],
)
def test_a_level_is_reproduced_within_the_tolerance_or_the_paired_interval(
    ours: float, more: dict[str, Any], verdict: str
) -> None:
    assert level(ours, **more) == verdict


def test_full_precision_has_no_interval_to_itself() -> None:
    cell = Cell("I", "0", "task", "FP", "", "FID", "9.00", "50000", "")
    found = Found(Row({"method": "fp"}, {}, (0,)), {0: run_of(TINY.rows[0], metrics={"fid": metric(9.6, n=50000)})})
    one = verdicts.Compared(found, cell, "", mean=9.6, n=50000)
    assert verdicts.level_verdict(one, "fid", None) == "differs"
    assert verdicts.level_verdict(one, "is", None) == "undecided: no printed difference to FP"


def test_the_interval_of_a_level_comes_from_the_draws() -> None:
    table = load("table1_cifar10", "paper")
    fp, row = table.rows[0], next(row for row in table.rows if row.run.get("method") == "edadm")
    runs = [run_of(fp, 0, {"fid": metric(8.0, n=50000)})]
    runs += [run_of(row, seed, {"fid": metric(8.1 + seed / 100, n=50000)}) for seed in range(3)]
    draws = {run.hash: draws_of(run, "fid") for run in runs}

    def verdict(draws: Mapping[str, Draws]) -> str:
        rows, _ = find_rows(table, runs)
        (fid,) = [one for one in verdicts.compare(table, rows, draws) if one.name == "FID"]
        return next(one.verdict for one in fid.rows if one.found.row.run == row.run)

    assert verdict({}) == "undecided: no interval of the difference to FP"
    assert verdict(draws) in ("reproduced", "differs")


def test_the_label_of_friendliness_is_compared_as_a_word() -> None:
    table = load("table1_cifar10")
    rows, _ = find_rows(table, [run_of(table.rows[1]), run_of(table.rows[8], activation_sets="per_step")])
    found = verdicts.compare(table, rows, {})
    assert [one.name for one in found] == ["FID", "IS", "Friendly"]
    by_run = {one.found.row.run.get("method", "") + one.found.row.run.get("bits", ""): one for one in found[-1].rows}
    assert (by_run["ptq4dmw8a8"].own_text, by_run["ptq4dmw8a8"].verdict) == ("yes", "same label")
    assert (by_run["edadmw8a8"].own_text, by_run["edadmw8a8"].verdict) == ("no", "differs")
    assert by_run["fp"].verdict == "–"


def test_costs_are_compared_without_any_error() -> None:
    table = load("table10_hardware")
    runs = [run_of(table.rows[0], cost=COST | {"size_mb": 8.0}), run_of(table.rows[2])]
    rows, _ = find_rows(table, runs)
    sizes = next(one for one in verdicts.compare(table, rows, {}) if one.name == "ModelSize_MB")
    assert [one.mean for one in sizes.rows] == [8.0, None, 7.0]
    assert (sizes.rows[0].effect, sizes.rows[0].verdict) == (1.0, "opposite direction")  # equal in the paper
    assert sizes.rows[2].verdict == "reference row"

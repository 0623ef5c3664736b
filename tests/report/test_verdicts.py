from __future__ import annotations

from typing import Any

import pytest

from edadm.comparison import Difference
from edadm.records import Record
from edadm.report.claims import BETTER, NO_WORSE, Claim, Claims
from edadm.report.sheet import markdown
from edadm.report.verdicts import (
    CONTRADICTED,
    NOT_RUN,
    SUPPORTED,
    UNDECIDED,
    Verdict,
    Verdicts,
    decide,
    judge,
    verdict_lines,
    verdict_sheets,
)
from tests.report.records_for_tests import fp, metric, record, resampled


def claim(second: str = "rtn", **fields: Any) -> Claim:
    given = {
        "id": "I-1", "source": "Table I", "statement": "EDA-DM is better", "metric": "FID", "metrics": ("fid", "fd_tiny"),
        "tasks": {"toy": {}}, "first": {"method": "edadm"}, "second": {"method": second},
    }  # fmt: skip
    return Claim(**(given | fields))


def runs(method: str, values: list[float], **fields: Any) -> list[Record]:
    return [record(method, seed, fd=value, **fields) for seed, value in enumerate(values)]


def judged(records: list[Record], *claims: Claim, spread: float = 0.1) -> Verdicts:
    return judge(Claims(claims or (claim(),), ("sqnr",)), records, resampled(records, spread))


def only(records: list[Record], *claims: Claim, spread: float = 0.1) -> Verdict:
    [verdict] = judged(records, *claims, spread=spread).verdicts
    return verdict


def made(value: float, seeds: int = 3, half: float = 1.0) -> Difference:
    """A difference whose interval is value plus and minus half, of metrics around 10."""
    return Difference(value, 1001, tuple(range(seeds)), half / 1.9623, 0.0 if seeds > 1 else None, 0.0, 10.0, 1001)


@pytest.mark.parametrize(
    ("value", "better", "expected"),
    [
        (-2.0, -1, SUPPORTED),
        (2.0, -1, CONTRADICTED),
        (0.5, -1, UNDECIDED),
        (2.0, 1, SUPPORTED),
        (-2.0, 1, CONTRADICTED),
    ],
)
def test_better_needs_an_interval_without_zero(value: float, better: int, expected: str) -> None:
    assert decide(made(value), better, claim(relation=BETTER)) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, SUPPORTED), (0.9, SUPPORTED), (1.2, UNDECIDED), (2.8, UNDECIDED), (3.2, CONTRADICTED), (-9.0, SUPPORTED)],
)
def test_no_worse_allows_the_margin(value: float, expected: str) -> None:
    # a distance: higher is worse; the margin is 20 % of 10, the interval value plus and minus 1
    assert decide(made(value), -1, claim(relation=NO_WORSE, margin=0.2)) == expected


def test_nothing_is_decided_with_two_seeds() -> None:
    assert decide(made(-9.0, seeds=2), -1, claim()) == UNDECIDED
    assert decide(made(-9.0, seeds=2), -1, claim(relation=NO_WORSE, margin=0.5)) == UNDECIDED


def test_a_claim_is_supported_by_the_metric_that_stands_for_the_printed_one() -> None:
    verdict = only([*runs("edadm", [10.0, 10.1, 10.2]), *runs("rtn", [20.0, 20.1, 20.2])])
    assert (verdict.outcome, verdict.metric) == (SUPPORTED, "fd_tiny")
    assert verdict.found is not None and verdict.found.value == pytest.approx(-10.0)
    assert verdict.group["task"] == "toy" and verdict.group["steps"] == 20


def test_the_printed_metric_comes_first_where_records_have_it() -> None:
    both = {"fd_tiny": metric(1.0), "fid": metric(9.0)}
    records = [record("edadm", metrics=both), record("rtn", metrics=both)]
    verdict = only(records)
    assert (verdict.metric, verdict.outcome) == ("fid", UNDECIDED)
    neither = [record(method, metrics={"sqnr": metric(1.0, True)}) for method in ("edadm", "rtn")]
    assert only(neither).why == "the records have none of fid, fd_tiny"


def test_a_claim_is_contradicted_and_undecided() -> None:
    assert only([*runs("edadm", [20.0, 20.1, 20.2]), *runs("rtn", [10.0, 10.1, 10.2])]).outcome == CONTRADICTED
    open_one = only([*runs("edadm", [10.0, 12.0, 11.0]), *runs("rtn", [11.0, 12.2, 12.4])])
    assert open_one.outcome == UNDECIDED
    assert open_one.design is not None and open_one.design.seeds and open_one.design.seeds > 3


def test_few_seeds_or_missing_draws_say_so() -> None:
    one_seed = [*runs("edadm", [10.0]), *runs("rtn", [20.0])]
    assert (only(one_seed).outcome, only(one_seed).why) == (UNDECIDED, "1 of 3 seeds")
    [verdict] = judge(Claims((claim(),), ()), one_seed, {}).verdicts
    assert (verdict.found, verdict.why) == (None, "no interval before `python -m edadm.compare`")
    apart = [record("edadm", 0), record("rtn", 1)]
    assert only(apart).why == "the sides share no seed"


def test_metrics_of_fidelity_stand_beside_a_verdict() -> None:
    records = [*runs("edadm", [10.0] * 3, sqnr=18.0), *runs("rtn", [20.0] * 3, sqnr=25.0)]
    assert only(records).fidelity == {"sqnr": CONTRADICTED}


def test_loss_against_full_precision_has_a_margin() -> None:
    near = claim("fp", relation=NO_WORSE, margin=0.05)
    assert only([fp(10.0), *runs("edadm", [10.1, 10.1, 10.1])], near).outcome == SUPPORTED
    assert only([fp(10.0), *runs("edadm", [11.0, 11.0, 11.0])], near).outcome == CONTRADICTED
    assert only([fp(10.0), *runs("edadm", [10.4, 9.9, 10.8])], near).outcome == UNDECIDED
    assert only([fp(10.0), *runs("edadm", [9.0, 9.0, 9.0])], near).outcome == SUPPORTED


def test_each_group_of_comparable_records_has_its_own_verdict() -> None:
    fifty = {"protocol": {"steps": 50}, "config": {"steps": 50}}
    records = [
        *runs("edadm", [10.0] * 3), *runs("rtn", [20.0] * 3),
        *runs("edadm", [20.0] * 3, **fifty), *runs("rtn", [10.0] * 3, **fifty),
    ]  # fmt: skip
    found = {one.group["steps"]: one.outcome for one in judged(records).verdicts}
    assert found == {20: SUPPORTED, 50: CONTRADICTED}


def test_sheets_of_other_samplers_have_other_headings() -> None:
    records = []
    for name, scale in (("ddim", 1.0), ("plms", 1.0), ("plms", 3.0)):
        protocol = {"sampler": {"part": name, "steps": 20}, "guidance": {"scale": scale}}
        given = {"protocol": protocol, "config": {"sampler": {"name": name}, "scale": scale}}
        records += [*runs("edadm", [10.0] * 3, **given), *runs("rtn", [20.0] * 3, **given)]
    sheets = verdict_sheets(judged(records))[:-1]
    ends = [sheet.heading.rpartition("n=2048")[2] for sheet in sheets]
    assert sorted(ends) == [
        f", {name}, guidance {scale}" for name, scale in (("ddim", 1.0), ("plms", 1.0), ("plms", 3.0))
    ]
    assert {len(sheet.lines) for sheet in sheets} == {1}


def test_a_verdict_says_how_many_seeds_diverged() -> None:
    lost = [record("edadm", seed, status="diverged", reason="nan", metrics={}) for seed in (3, 4)]
    both = [*runs("edadm", [10.0, 10.1, 10.2]), *runs("rtn", [20.0, 20.1, 20.2])]
    assert (only([*both, *lost]).outcome, only([*both, *lost]).why) == (SUPPORTED, "edadm: 2 seeds diverged")
    found = judged([*lost, *runs("rtn", [20.0])])
    assert [(one.outcome, one.why) for one in found.verdicts] == [(UNDECIDED, "edadm: 2 seeds diverged")]
    assert found.not_run == ()
    assert judged(lost).verdicts == ()  # nothing of the other side was tried
    assert judged(lost, claim("fp")).verdicts == ()
    assert [one.why for one in judged([fp(), *lost], claim("fp")).verdicts] == ["edadm: 2 seeds diverged"]


def test_two_versions_of_a_metric_are_the_reason() -> None:
    sides = [record(m, metrics={"fd_tiny": metric(1.0, version=v)}) for m, v in (("edadm", 1), ("rtn", 2))]
    assert only(sides).why == "fd_tiny was measured in versions 1, 2: run the older ones again"


def test_claims_without_records_are_not_run_or_not_available_yet() -> None:
    here = claim("qdiffusion", tasks={"cifar10_tiny": {}})
    elsewhere = claim("no_such_method", tasks={"no_such_task": {}}, id="II-1")
    found = judged([], here, elsewhere)
    assert found.verdicts == ()
    assert [(one.id, lines[0]) for one, lines in found.not_run] == [
        ("I-1", "python run.py -m task=cifar10_tiny method=edadm seed=0,1,2")
    ]
    assert [(one.id, parts) for one, parts in found.not_yet] == [
        ("II-1", ("method no_such_method", "task no_such_task"))
    ]
    text = markdown(verdict_sheets(found))
    assert text.startswith(
        "## claims of the paper: 0 supported, 0 contradicted, 0 undecided at this n, 1 not run, 1 not available yet"
    )
    assert "- Not available yet: II-1. They need method no_such_method, task no_such_task." in text
    assert "- Not run: I-1: `python run.py experiments=table1_cifar10`" in text


def test_the_sheet_says_effect_interval_n_seeds_and_what_it_may_not_be_taken_for() -> None:
    records = [*runs("edadm", [10.0, 12.0, 11.0]), *runs("rtn", [10.5, 11.0, 12.5])]
    [sheet, summary] = verdict_sheets(judged(records))
    assert sheet.heading == "verdicts, toy, 20 steps, scope full, preset released, profile reference, n=2048"
    [line] = sheet.lines
    assert line.cells[:4] == ("I-1: EDA-DM is better", "Table I, FID", UNDECIDED, "fd_tiny")
    assert line.cells[4].startswith("-0.3") and line.cells[5].startswith("[-")
    assert line.cells[6:8] == ("2048", "3")
    assert line.cells[9] == "sqnr ?"
    notes = " ".join(note.text for note in sheet.notes)
    assert "not comparable with published FID" in notes and "Proxies" in notes
    assert "1 undecided" in summary.heading


def test_lines_hold_every_number() -> None:
    records = [*runs("edadm", [10.0, 10.1, 10.2]), *runs("rtn", [20.0, 20.1, 20.2])]
    one, other = verdict_lines(judged(records, claim(), claim("adaround", id="I-2", tasks={"cifar10_tiny": {}})))
    assert (one["claim"], one["verdict"], one["measured_by"], one["seeds"], one["n"]) == (
        "I-1", SUPPORTED, "fd_tiny", 3, 2048,
    )  # fmt: skip
    assert one["low"] < one["difference"] < one["high"] < 0
    assert (other["claim"], other["verdict"]) == ("I-2", NOT_RUN)

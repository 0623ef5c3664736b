"""How often each method wins: one contest for each task and protocol, bit width, seed and metric."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edadm.comparison import Draws, difference, newest_by_seed
from edadm.records import Record
from edadm.report.published import is_published
from edadm.report.sheet import Line, Note, Sheet
from edadm.report.table import family, group

WON, UNDECIDED, LOST = "won", "undecided", "lost"


@dataclass(frozen=True)
class Standing:
    """How a method fared in one metric: in how many contests it took part, won, lost, or was not told from the best."""

    profile: str
    n_images: int
    scope: str
    preset: str
    metric: str
    method: str
    contests: int
    won: int
    undecided: int
    lost: int


def ranks(records: Iterable[Record], draws: Mapping[str, Draws]) -> list[Standing]:
    """Return the standing of every method as published, for each profile, number of images, scope, preset and metric.

    A method wins a contest if the paired interval over images tells it from every other; those that are not told from
    the best share an undecided one. Methods with other parts than their own and the demo profile take no part.
    """
    results: dict[tuple[str, int, str, str, str, str], Counter[str]] = defaultdict(Counter)
    for runs in _contests(records):
        first = runs[0]
        for metric, higher_is_better in _metrics(runs).items():
            for method, result in _contest(runs, metric, higher_is_better, draws).items():
                results[first.profile, first.n_images, first.scope, first.preset, metric, method][result] += 1
    standings = [
        Standing(*key, contests=counts.total(), won=counts[WON], undecided=counts[UNDECIDED], lost=counts[LOST])
        for key, counts in results.items()
    ]
    order = {metric: index for index, metric in enumerate(dict.fromkeys(one.metric for one in standings))}
    return sorted(
        standings,
        key=lambda one: (*_heading(one), order[one.metric], -one.won, one.lost, one.method),
    )


def _heading(one: Standing) -> tuple[str, int, str, str]:
    return one.profile, one.n_images, one.scope, one.preset


def _contests(records: Iterable[Record]) -> list[list[Record]]:
    """Return the runs of each task and protocol, bit width and seed, one a method, where there are at least two."""
    found: dict[Any, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.status == "ok" and not record.is_fp and record.profile != "demo" and is_published(record):
            found[family(record), group(record), record.seed][record.method].append(record)
    contests = [
        [run for runs in methods.values() for run in newest_by_seed(runs).values()]
        for _, methods in sorted(found.items())
    ]
    return [sorted(runs, key=lambda run: run.method) for runs in contests if len(runs) > 1]


def _metrics(runs: Iterable[Record]) -> dict[str, bool]:
    """Return the metrics with a direction and whether higher is better, in the order the runs name them."""
    return {
        name: bool(result["higher_is_better"])
        for run in runs
        for name, result in run.metrics.items()
        if result.get("value") is not None and result.get("higher_is_better") is not None
    }


def _contest(runs: list[Record], metric: str, higher_is_better: bool, draws: Mapping[str, Draws]) -> dict[str, str]:
    """Return the result of each method that has the metric; without draws nothing is decided."""
    sign = 1 if higher_is_better else -1
    taking_part = [run for run in runs if run.metrics.get(metric, {}).get("value") is not None]
    if len(taking_part) < 2:
        return {}
    best = max(taking_part, key=lambda run: sign * float(run.metrics[metric]["value"]))
    behind = {run.method for run in taking_part if run is not best and _is_better(best, run, metric, sign, draws)}
    alone = len(behind) == len(taking_part) - 1
    return {run.method: LOST if run.method in behind else WON if alone else UNDECIDED for run in taking_part}


def _is_better(first: Record, second: Record, metric: str, sign: int, draws: Mapping[str, Draws]) -> bool:
    found = difference({first.seed: first}, {second.seed: second}, metric, draws)
    return found is not None and found.sign == sign


def rank_sheets(standings: Iterable[Standing]) -> list[Sheet]:
    """Return a sheet for each profile, number of images, scope and preset."""
    groups: dict[tuple[str, int, str, str], list[Standing]] = defaultdict(list)
    for one in standings:
        groups[_heading(one)].append(one)
    notes = (
        Note(
            "A contest is one task with its sampler and steps, bit width and seed. Won: the paired 95 % interval over "
            "images tells the method from every other. Undecided: not told from the best, or not resampled."
        ),
        Note(
            "Methods with their own parts only. Images decide a contest here, seeds do not: see the verdicts for both."
        ),
    )
    header = ("metric", "method", "contests", WON, UNDECIDED, LOST)
    return [
        Sheet(
            f"wins, profile {profile}, scope {scope}, preset {preset}, n={n_images}",
            header,
            tuple(
                Line((one.metric, one.method, *map(str, (one.contests, one.won, one.undecided, one.lost))))
                for one in found
            ),
            notes,
        )
        for (profile, n_images, scope, preset), found in groups.items()
    ]


def no_contest(records: Iterable[Record]) -> Sheet:
    """Return why there is no standing at all."""
    done = [record for record in records if record.status == "ok" and not record.is_fp]
    if not done:
        why = "no finished run of a quantized model"
    elif all(record.profile == "demo" for record in done):
        why = "the demo profile takes no part, its images are too few"
    else:
        why = "no two methods as published have a run of the same task, bit width, profile and seed"
    return Sheet(f"no contest: {why}", (), ())


def rank_lines(standings: Iterable[Standing]) -> list[dict[str, Any]]:
    """Return a line for each standing, for CSV."""
    return [asdict(one) for one in standings]

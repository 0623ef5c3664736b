"""The ordered claims of the paper, ``results/paper/claims.yaml``, and the records that speak to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edadm.checkout import root
from edadm.comparison import newest_by_seed
from edadm.errors import EdadmError
from edadm.records import FP_METHOD, Record, date
from edadm.report import experiment_file
from edadm.report.experiment_file import SCALES, missing_parts, same
from edadm.report.published import is_published
from edadm.report.table import family

CLAIMS = Path("results/paper/claims.yaml")
BETTER, NO_WORSE = "better", "no worse"
ROWS = "rows"  # of a side; a record counts them in its profile
PARTS = ("calibration", "transform", "ranges", "reconstruction", "optimization", "activation_sets", "correction")
SIDE = ("method", "bits", ROWS, *PARTS)
Group = tuple[Any, ...]
Runs = dict[int, Record]


@dataclass(frozen=True)
class Claim:
    """One side is better than the other in a metric, or at most ``margin`` (relative to the second) worse.

    metrics: those of records that stand for the paper's, in order of preference. tasks: those that speak to the claim,
    with the counterparts of numbers of calibration rows outside of profile=paper.
    """

    id: str
    source: str
    statement: str
    metric: str
    metrics: tuple[str, ...]
    tasks: Mapping[str, Mapping[int, int]]
    first: Mapping[str, Any]
    second: Mapping[str, Any]
    relation: str = BETTER
    margin: float = 0.0


@dataclass(frozen=True)
class Claims:
    """All claims, and the metrics of fidelity that are shown beside each verdict."""

    claims: tuple[Claim, ...]
    fidelity: tuple[str, ...]


def load(path: Path | None = None) -> Claims:
    """Read the claims, by default those of the checkout. Raises EdadmError for a missing or malformed file."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = path or root() / CLAIMS
    if not path.is_file():
        raise EdadmError(f"no claims at {path}: they belong to the checkout (EDADM_ROOT names it)")
    try:
        data: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        claims = tuple(_claim(entry, data) for entry in data["claims"])
        if len({claim.id for claim in claims}) < len(claims):
            raise ValueError("two claims have the same id")
        return Claims(claims, tuple(data["fidelity"]))
    except (KeyError, TypeError, ValueError, OmegaConfBaseException, YAMLError) as error:
        raise EdadmError(f"{path} is malformed: {error!r}") from error


def _claim(entry: Mapping[str, Any], data: Mapping[str, Any]) -> Claim:
    for side in (entry["first"], entry["second"]):
        if "method" not in side or not side.keys() <= set(SIDE):
            raise ValueError(f"claim {entry['id']}: a side has a method and some of {', '.join(SIDE[1:])}, got {side}")
    if entry.get("relation", BETTER) not in (BETTER, NO_WORSE):
        raise ValueError(f"claim {entry['id']}: relation {entry['relation']!r}, expected {BETTER} or {NO_WORSE}")
    named = {key: value for key, value in entry.items() if key != "task"}
    return Claim(**named, metrics=tuple(data["metrics"][entry["metric"]]), tasks=data["tasks"][entry["task"]])


def sides(claim: Claim, records: Iterable[Record]) -> dict[Group, tuple[Runs, Runs]]:
    """Return the runs by seed of both sides, for each group of comparable records that has both.

    The demo profile speaks to no claim. Full precision is the same for every seed.
    """
    usable = _usable(claim, records)
    found = _by_side(claim, usable)
    pairs = {key: (newest_by_seed(first), newest_by_seed(second)) for key, (first, second) in found.items()}
    if claim.second["method"] == FP_METHOD:
        pairs = {key: (first, _full_precision(first, usable)) for key, (first, _) in pairs.items()}
    return {key: pair for key, pair in sorted(pairs.items()) if all(pair)}


def lost_runs(claim: Claim, records: Iterable[Record]) -> dict[Group, list[Record]]:
    """Return the runs that diverged or failed, one for each seed without a result, where both sides were tried."""
    usable = _usable(claim, records)
    full_precision = [record for record in usable if record.is_fp]
    found = {}
    for key, (first, second) in _by_side(claim, usable).items():
        tried = (first, full_precision if claim.second["method"] == FP_METHOD else second)
        lost = [record for side in tried for record in _lost_of(side)]
        if lost and all(tried):
            found[key] = lost
    return dict(sorted(found.items()))


def _lost_of(side: Iterable[Record]) -> list[Record]:
    runs = sorted(side, key=lambda record: (record.seed, date(record), record.hash))
    done = {record.seed for record in runs if record.status == "ok"}
    ended = {record.seed: record for record in runs if record.status in ("diverged", "failed")}
    return [record for seed, record in ended.items() if seed not in done]


def _usable(claim: Claim, records: Iterable[Record]) -> list[Record]:
    return [record for record in records if record.task in claim.tasks and record.profile != "demo"]


def _by_side(claim: Claim, records: Iterable[Record]) -> dict[Group, tuple[list[Record], list[Record]]]:
    """Return the runs of both sides, finished or not, for each group of comparable records."""
    found: dict[Group, tuple[list[Record], list[Record]]] = defaultdict(lambda: ([], []))
    for record in records:
        for place, side in enumerate((claim.first, claim.second)):
            if not record.is_fp and fits(record, side, claim.tasks[record.task]):
                found[_group(record)][place].append(record)
    return found


def _group(record: Record) -> Group:
    return (family(record), record.profile, record.scope, record.preset, record.bits.softmax)


def _full_precision(runs: Runs, records: Iterable[Record]) -> Runs:
    families = {family(record) for record in runs.values()}
    found = newest_by_seed(record for record in records if record.is_fp and family(record) in families)
    return {} if not found else dict.fromkeys(runs, list(found.values())[-1])


def fits(record: Record, side: Mapping[str, Any], counterparts: Mapping[int, int]) -> bool:
    """Say whether a record is a run of one side of a claim: in its parts, and in all else its method as published."""
    if (record.method, record.bits.name) != (side["method"], side.get("bits", record.bits.name)):
        return False
    if any(getattr(record, part) != side[part] for part in PARTS if part in side):
        return False
    named = {part for part in PARTS if part in side} | ({"profile.rows"} if ROWS in side else set())
    return (ROWS not in side or _has_rows(record, side[ROWS], counterparts)) and is_published(record, named)


def _has_rows(record: Record, rows: int, counterparts: Mapping[int, int]) -> bool:
    wanted = rows if record.profile == "paper" else counterparts.get(rows, rows)
    return same(str(record.config.get("profile", {}).get("rows")), str(wanted))


def absent_parts(claim: Claim) -> list[str]:
    """Return what a claim needs and the project does not have, as ``method ptqd``; empty where it can be run."""
    words = [{key: str(value) for key, value in side.items() if key != ROWS} for side in (claim.first, claim.second)]
    parts = list(dict.fromkeys(part for side in words for part in missing_parts(side)))
    if all(missing_parts({"task": task}) for task in claim.tasks):
        parts.append(f"task {' or '.join(claim.tasks)}")
    return parts


def commands(claim: Claim, seeds: Iterable[int]) -> list[str]:
    """Return the commands that make both sides of a claim on the last of its tasks that there is."""
    task = [name for name in claim.tasks if not missing_parts({"task": name})][-1]
    lines = []
    for side in (claim.first, claim.second):
        if side["method"] == FP_METHOD:
            continue  # every run makes its full-precision row
        words = [f"{key}={value}" for key, value in side.items() if key != ROWS]
        if ROWS in side:
            words.append(f"profile.rows={claim.tasks[task].get(side[ROWS], side[ROWS])}")
        lines.append(" ".join(["python run.py -m", f"task={task}", *words, f"seed={','.join(map(str, seeds))}"]))
    return lines


def experiment_command(claim: Claim) -> str | None:
    """Return the command that runs the table of a claim at the scale whose tasks speak to it, None without a table."""
    for name in experiment_file.names():
        for scale in SCALES if experiment_file.source_of(name) == claim.source else ():
            if not claim.tasks.keys().isdisjoint(experiment_file.load(name, scale).tasks):
                return f"python run.py experiments={name}" + ("" if scale == SCALES[0] else f" scale={scale}")
    return None

"""The paper's ordered claims against the records: supported, contradicted, or undecided at this n."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from edadm.comparison import FEW_SEEDS, Design, Difference, Draws, deciding_design, difference, no_difference
from edadm.records import Record, device_kind
from edadm.report.claims import (
    NO_WORSE,
    Claim,
    Claims,
    Runs,
    absent_parts,
    commands,
    experiment_command,
    lost_runs,
    sides,
)
from edadm.report.experiment_file import NOT_YET
from edadm.report.labels import apart, base_label, counted, sampling
from edadm.report.render import difference_decimals
from edadm.report.sheet import Line, Note, Sheet
from edadm.report.table import COMPARE, FEW_IMAGES

SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided at this n"
NOT_RUN = "not run"
SHORT = {SUPPORTED: "yes", CONTRADICTED: "no", UNDECIDED: "?"}
SEEDS = tuple(range(FEW_SEEDS))  # of the commands that fill a gap


@dataclass(frozen=True)
class Verdict:
    """What one group of comparable records says of a claim.

    metric: the one of the records that stands for the paper's. found: its difference, first side minus second. why:
    what is missing for a verdict. design: what would decide an undecided claim. fidelity: the verdicts by metrics of
    nearness to full precision.
    """

    claim: Claim
    group: Mapping[str, Any]
    metric: str
    outcome: str
    found: Difference | None = None
    why: str = ""
    design: Design | None = None
    fidelity: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdicts:
    """All verdicts, and the claims without any: those that could be run, and those that need what is not there yet."""

    verdicts: tuple[Verdict, ...]
    not_run: tuple[tuple[Claim, tuple[str, ...]], ...]  # with the commands
    not_yet: tuple[tuple[Claim, tuple[str, ...]], ...]  # with the parts


def judge(claims: Claims, records: Iterable[Record], draws: Mapping[str, Draws]) -> Verdicts:
    """Hold every claim against every group of comparable records that has both of its sides."""
    everything = list(records)
    verdicts: list[Verdict] = []
    not_run: list[tuple[Claim, tuple[str, ...]]] = []
    not_yet: list[tuple[Claim, tuple[str, ...]]] = []
    for claim in claims.claims:
        lost = lost_runs(claim, everything)
        pairs = sides(claim, everything)
        found = [
            _verdict(claim, *pair, claims.fidelity, draws, _lost(lost.get(key, ()))) for key, pair in pairs.items()
        ]
        found += [
            Verdict(claim, _facts(runs[0]), claim.metric, UNDECIDED, why=_lost(runs))
            for key, runs in lost.items()
            if key not in pairs
        ]
        verdicts += found
        if found:
            continue
        if absent := absent_parts(claim):
            not_yet.append((claim, tuple(absent)))
        else:
            not_run.append((claim, tuple(commands(claim, SEEDS))))
    return Verdicts(tuple(verdicts), tuple(not_run), tuple(not_yet))


def _lost(runs: Iterable[Record]) -> str:
    """Return how many seeds of each method have no result; those that are left may be the lucky ones."""
    by_method: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        by_method[base_label(run)].append(run.status)
    return "; ".join(f"{label}: {counted(statuses)}" for label, statuses in by_method.items())


def _verdict(
    claim: Claim, first: Runs, second: Runs, fidelity: Sequence[str], draws: Mapping[str, Draws], lost: str
) -> Verdict:
    group = _facts(next(iter(first.values())))
    metric = next((name for name in claim.metrics if _has(first, name) and _has(second, name)), None)
    if metric is None:
        why = f"the records have none of {', '.join(claim.metrics)}"
        return Verdict(claim, group, claim.metric, UNDECIDED, why=_joined(why, lost))
    found = difference(first, second, metric, draws)
    if found is None:
        why = no_difference(first, second, metric) or f"no interval before `{COMPARE}`"
        return Verdict(claim, group, metric, UNDECIDED, why=_joined(why, lost))
    better = _direction(first, metric)
    outcome = decide(found, better, claim)
    design = None
    if outcome == UNDECIDED:
        design = deciding_design(found, target=-better * _margin(claim, found))
    nearness = {
        name: _nearness(difference(first, second, name, draws), _direction(first, name), claim) for name in fidelity
    }
    why = f"{len(found.seeds)} of {FEW_SEEDS} seeds" if len(found.seeds) < FEW_SEEDS else ""
    known = {name: text for name, text in nearness.items() if text}
    return Verdict(claim, group, metric, outcome, found, _joined(why, lost), design, known)


def _joined(*texts: str) -> str:
    return "; ".join(text for text in texts if text)


def decide(found: Difference, better: int, claim: Claim) -> str:
    """Return what a difference (first side minus second) says of a claim.

    better: +1 where higher is better, else -1. The whole interval must lie on one side of zero, or for "no worse" of
    minus the margin.
    """
    if len(found.seeds) < FEW_SEEDS:
        return UNDECIDED
    low, high = sorted(better * end for end in found.interval)  # above zero: the first side is better
    least = -_margin(claim, found)
    if low > least:
        return SUPPORTED
    return CONTRADICTED if high < least else UNDECIDED


def _margin(claim: Claim, found: Difference) -> float:
    return claim.margin * abs(found.level) if claim.relation == NO_WORSE else 0.0


def _nearness(found: Difference | None, better: int, claim: Claim) -> str:
    """Return whether a metric of fidelity orders the sides as the claim does; a claim of no less has no such order."""
    if found is None or claim.relation == NO_WORSE:
        return ""
    return decide(found, better, claim)


def _has(runs: Runs, metric: str) -> bool:
    return any(run.metrics.get(metric, {}).get("value") is not None for run in runs.values())


def _direction(runs: Runs, metric: str) -> int:
    higher = next((run.metrics[metric]["higher_is_better"] for run in runs.values() if metric in run.metrics), None)
    return 1 if higher else -1


def _facts(record: Record) -> dict[str, Any]:
    return {
        "task": record.task,
        **sampling(record),
        "device": device_kind(record),
        "scope": record.scope,
        "preset": record.preset,
        "profile": record.profile,
        "n_images": record.n_images,
        "precision": record.precision,
    }


def verdict_sheets(judged: Verdicts) -> list[Sheet]:
    """Return a sheet for each group of comparable records, and one that sums up and names what is missing."""
    groups: dict[tuple[Any, ...], list[Verdict]] = defaultdict(list)
    for one in judged.verdicts:
        groups[tuple(one.group.values())].append(one)
    sheets = [_sheet(found) for found in groups.values()]
    extras = _extras(sheets, [found[0].group for found in groups.values()])
    told_apart = [replace(one, heading=f"{one.heading}{extra}") for one, extra in zip(sheets, extras, strict=True)]
    return [*told_apart, _summary(judged)]


def _extras(sheets: Sequence[Sheet], facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what the headings need that are equal without it: sampling and device as far as they differ."""
    alike = [[other for one, other in zip(sheets, facts) if one.heading == sheet.heading] for sheet in sheets]
    texts = [apart([own, *others])[0] for own, others in zip(facts, alike, strict=True)]
    return [f", {text}" if text else "" for text in texts]


def _sheet(verdicts: Sequence[Verdict]) -> Sheet:
    facts = verdicts[0].group
    shared = f"scope {facts['scope']}, preset {facts['preset']}, profile {facts['profile']}, n={facts['n_images']}"
    header = ("claim", "source", "verdict", "by", "difference", "95 % interval", "n", "seeds", "would decide", "to FP")
    notes = [
        "Difference: first method of the claim minus second, mean over seeds, paired on the same noise; interval over "
        "images and seeds (docs/statistics.md).",
        f"Nothing is decided with fewer than {FEW_SEEDS} seeds. Would decide: what finds a difference as large as the "
        "measured one with 80 % power.",
        "To FP: whether metrics of nearness to full precision put the two in the same order; the paper claims nothing "
        "about them.",
        "Of twenty claims about equal methods one is decided by chance.",
    ]
    if any(one.metric != one.claim.metric.lower() for one in verdicts):
        notes.append("Proxies (..._tiny) stand for the paper's metrics: a verdict by them is one on this task only.")
    if facts["n_images"] < FEW_IMAGES:
        notes.append(f"n={facts['n_images']} images: not comparable with published FID.")
    lines = tuple(_line(one) for one in verdicts)
    return Sheet(f"verdicts, {facts['task']}, {facts['steps']} steps, {shared}", header, lines, tuple(map(Note, notes)))


def _line(verdict: Verdict) -> Line:
    claim, found = verdict.claim, verdict.found
    numbers, wanted = ("–",) * 4, verdict.why
    if found is not None:
        decimals = difference_decimals([found])
        low, high = found.interval
        interval = f"[{low:+.{decimals}f}, {high:+.{decimals}f}]"
        numbers = (f"{found.value:+.{decimals}f}", interval, str(found.n), str(len(found.seeds)))
        wanted = _joined(verdict.why, str(verdict.design or ""))
    nearness = ", ".join(f"{name} {SHORT[outcome]}" for name, outcome in verdict.fidelity.items())
    cells = (f"{claim.id}: {claim.statement}", f"{claim.source}, {claim.metric}", verdict.outcome, verdict.metric)
    return Line((*cells, *numbers, wanted, nearness))


def _summary(judged: Verdicts) -> Sheet:
    counts = Counter(one.outcome for one in judged.verdicts)
    parts = [f"{counts[outcome]} {outcome}" for outcome in (SUPPORTED, CONTRADICTED, UNDECIDED)]
    parts += [f"{len(judged.not_run)} {NOT_RUN}", f"{len(judged.not_yet)} {NOT_YET}"]
    waiting: dict[str, list[str]] = defaultdict(list)
    for claim, lines in judged.not_run:
        waiting[experiment_command(claim) or "; ".join(lines)].append(claim.id)
    notes = [Note(f"{NOT_RUN.capitalize()}: {', '.join(ids)}", command) for command, ids in waiting.items()]
    if judged.not_yet:
        ids = ", ".join(claim.id for claim, _ in judged.not_yet)
        absent = ", ".join(dict.fromkeys(part for _, found in judged.not_yet for part in found))
        notes.append(Note(f"{NOT_YET.capitalize()}: {ids}. They need {absent}."))
    return Sheet(f"claims of the paper: {', '.join(parts)}", (), (), tuple(notes))


def verdict_lines(judged: Verdicts) -> list[dict[str, Any]]:
    """Return a line for each verdict and each claim without one, with every number, for CSV."""
    lines = []
    for one in judged.verdicts:
        found = one.found
        low, high = (None, None) if found is None else found.interval
        lines.append(
            _claim_facts(one.claim)
            | {"verdict": one.outcome, "why": one.why, "measured_by": one.metric}
            | dict(one.group)
            | {
                "difference": None if found is None else found.value,
                "low": low,
                "high": high,
                "without_bias": None if found is None else found.value - found.bias,
                "n": None if found is None else found.n,
                "seeds": None if found is None else len(found.seeds),
                "image_error": None if found is None else found.image_error,
                "seed_deviation": None if found is None else found.seed_deviation,
                "deciding_seeds": one.design and one.design.seeds,
                "deciding_images": one.design and one.design.images,
                "fidelity": "; ".join(f"{name}={outcome}" for name, outcome in one.fidelity.items()),
            }
        )
    lines += [_claim_facts(claim) | {"verdict": NOT_RUN, "why": "; ".join(how)} for claim, how in judged.not_run]
    lines += [_claim_facts(claim) | {"verdict": NOT_YET, "why": ", ".join(how)} for claim, how in judged.not_yet]
    return lines


def _claim_facts(claim: Claim) -> dict[str, Any]:
    return {"claim": claim.id, "source": claim.source, "statement": claim.statement, "metric": claim.metric}

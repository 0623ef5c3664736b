"""`python -m edadm.results`: what a sweep is doing, what the cache holds, and records sent to Weights & Biases."""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from edadm.errors import EdadmError
from edadm.journal import Run, Sweep, read_runs, read_sweeps
from edadm.progress import duration
from edadm.records import Record, pictures, read_all
from edadm.store import Artefact, Store
from edadm.tracking import Mode, push

ALL_RESULTS = Path("results")
DEFAULT_RESULTS = ALL_RESULTS / "local"
REFERENCE_RESULTS = ALL_RESULTS / "reference"  # a run with a record there is not made again
STATES = ("ok", "running", "waiting", "skipped", "diverged", "failed", "killed")


@dataclass(frozen=True)
class Job:
    """One run of a sweep as its record, else its journal, else the announcement tells it."""

    hash: str
    label: str
    state: str
    seconds: float | None = None  # of this attempt, so far if running
    detail: str = ""


def jobs_of(sweep: Sweep, records: dict[str, Record], runs: dict[str, Run], now: float) -> list[Job]:
    """Return the state of every job of a sweep in its order."""
    return [_job(hash, label, records.get(hash), runs.get(hash), now) for hash, label in sweep.jobs]


def _job(hash: str, label: str, record: Record | None, run: Run | None, now: float) -> Job:
    state = run.current_state if run is not None else "waiting"
    if run is not None and state == "running":
        return Job(hash, label, state, now - run.started, run.stage or "")
    seconds = run.updated - run.started if run is not None else None
    if record is not None:
        return Job(hash, label, record.status, seconds, record.reason or "")
    if run is None:
        return Job(hash, label, "waiting")
    detail = run.error or (f"process {run.pid} ended in stage {run.stage}: run it again" if state == "killed" else "")
    # a journal that says ok without a record: the record was deleted, so the run waits to be made again
    return Job(hash, label, "waiting" if state == "ok" else state, seconds, detail)


def seconds_left(jobs: Sequence[Job]) -> float | None:
    """Return a rough time until a sweep ends: mean time of its finished runs, spread over those that run now.

    None when nothing has finished or nothing is left to do.
    """
    finished = [job.seconds for job in jobs if job.state in ("ok", "diverged") and job.seconds is not None]
    running = [job for job in jobs if job.state == "running"]
    waiting = sum(job.state in ("waiting", "killed") for job in jobs)
    if not finished or not (running or waiting):
        return None
    mean = statistics.fmean(finished)
    rest = [max(0.0, mean - (job.seconds or 0.0)) for job in running]
    return max((waiting * mean + sum(rest)) / max(1, len(running)), *rest, 0.0)


def status(results_dir: Path, name: str | None, now: float) -> str:
    """Return the state of the announced sweeps (or the one named) and of runs outside of any as text."""
    records = {record.hash: record for record in read_all([REFERENCE_RESULTS, results_dir])}
    runs = {run.hash: run for run in read_runs(results_dir)}
    sweeps = read_sweeps(results_dir)
    chosen = [sweep for sweep in sweeps if name in (None, sweep.name)]
    if name is not None and not chosen:
        raise EdadmError(f"no sweep {name!r} in {results_dir}; known: {', '.join(s.name for s in sweeps) or 'none'}")
    parts = [_sweep_text(sweep.name, jobs_of(sweep, records, runs, now), now) for sweep in chosen]
    in_sweeps = {hash for sweep in sweeps for hash, _ in sweep.jobs}
    lone = [run for run in runs.values() if run.hash not in in_sweeps and name is None]
    if lone:
        jobs = [_job(run.hash, run.label, records.get(run.hash), run, now) for run in lone]
        parts.append(_sweep_text("single runs", jobs, now))
    return "\n".join(parts) or f"Nothing has been run in {results_dir}.\n"


def _sweep_text(name: str, jobs: Sequence[Job], now: float) -> str:
    counts = Counter(job.state for job in jobs)
    parts = [f"{counts[state]} {'done' if state == 'ok' else state}" for state in STATES if counts[state]]
    lines = [f"{name}: {len(jobs)} runs: {', '.join(parts)}"]
    left = seconds_left(jobs)
    if left is not None:
        end = datetime.fromtimestamp(now + left).strftime("%Y-%m-%d %H:%M")
        lines.append(f"  estimated end {end}, in {duration(left)} (from the mean of the finished runs)")
    elif counts["running"] or counts["waiting"] or counts["killed"]:
        lines.append("  estimated end unknown until a run has finished")
    for job in jobs:
        took = "" if job.seconds is None else duration(job.seconds)
        lines.append(
            f"  {'done' if job.state == 'ok' else job.state:<9}{job.hash[:8]}  {took:>8}  {job.label}".rstrip()
        )
        if job.detail:
            lines.append(f"{'':<11}{job.detail}")
    return "\n".join(lines) + "\n"


def garbage(store: Store, results: Sequence[Path], partial: bool) -> tuple[list[Artefact], list[Artefact]]:
    """Return (needed, not needed) artefacts: a record or the journal of an unfinished run needs those it names.

    What an unfinished build has left counts as needed, since its run goes on from there, unless partial.
    """
    needed = {(stage, hash) for record in read_all(results) for stage, hash in record.artefacts.items()}
    sets = {path.parent for folder in results for path in folder.rglob(".runs")} | set(results)
    for run in (run for folder in sets for run in read_runs(folder)):
        if run.current_state in ("running", "killed", "failed"):
            needed |= set(run.artefacts.items())
    kept: list[Artefact] = []
    dropped: list[Artefact] = []
    for artefact in store.artefacts():
        wanted = (artefact.stage, artefact.hash) in needed if artefact.complete else not partial
        (kept if wanted else dropped).append(artefact)
    return kept, dropped


def collect_garbage(store: Store, results: Sequence[Path], yes: bool, partial: bool) -> int:
    """List what the cache holds, and after a yes remove what no record needs; return the exit code."""
    if missing := [str(folder) for folder in results if not folder.is_dir()]:
        raise EdadmError(
            f"no results folder {', '.join(missing)}: without its records everything would look unneeded. "
            "Run this in the checkout or name the folders with --results"
        )
    kept, dropped = garbage(store, results, partial)
    print(f"{store.root}\n{_stage_table(kept, dropped)}")
    if not dropped:
        print("Every artefact is needed by a record or an unfinished run.")
        return 0
    for artefact in dropped:
        kind = "" if artefact.complete else " (unfinished)"
        print(f"  {artefact.stage}/{artefact.hash}  {megabytes(artefact.size):>10}  {artefact.label}{kind}")
    total = megabytes(sum(artefact.size for artefact in dropped))
    print(f"No record in {', '.join(map(str, results))} needs these. Other checkouts may share this cache.")
    if not yes and not _confirm(f"Remove {len(dropped)} artefacts ({total})? [y/N] "):
        print("Nothing was removed.")
        return 0
    busy = [artefact for artefact in dropped if not store.remove(artefact)]
    for artefact in busy:
        print(f"kept {artefact.stage}/{artefact.hash}: a process is building it")
    print(f"Removed {len(dropped) - len(busy)} artefacts.")
    return 0


def _stage_table(kept: Sequence[Artefact], dropped: Sequence[Artefact]) -> str:
    sizes: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for column, artefacts in ((0, kept), (2, dropped)):
        for artefact in artefacts:
            sizes[artefact.stage][column] += 1
            sizes[artefact.stage][column + 1] += artefact.size
    lines = [f"{'stage':<20}{'needed':>8}{'size':>12}{'unneeded':>10}{'size':>12}"]
    for stage, (count, size, spare, spare_size) in sorted(sizes.items()):
        lines.append(f"{stage:<20}{count:>8}{megabytes(size):>12}{spare:>10}{megabytes(spare_size):>12}")
    return "\n".join(lines)


def megabytes(size: int) -> str:
    """Return a number of bytes as MB (10^6)."""
    return f"{size / 1e6:.1f} MB"


def _confirm(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def push_wandb(results: Sequence[Path], names: Sequence[str], mode: Mode | None) -> int:
    """Send records, all or those whose hash or sweep is named, to Weights & Biases; return the exit code."""
    records = read_all(results)
    chosen = [r for r in records if not names or any(r.hash.startswith(name) or r.sweep == name for name in names)]
    if not chosen:
        raise EdadmError(f"no record of {', '.join(names) or 'any run'} in {', '.join(map(str, results))}")
    for record in chosen:
        print(f"{record.hash} {record.method} {record.bits.name}: {push(record, pictures(record, results), mode)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    options = _parser().parse_args(argv)
    try:
        if options.command == "status":
            print(status(options.results, options.sweep, time.time()), end="")
            return 0
        if options.command == "gc":
            return collect_garbage(Store(options.cache), options.results or [ALL_RESULTS], options.yes, options.partial)
        return push_wandb(options.results or [DEFAULT_RESULTS], options.names, options.mode)
    except EdadmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m edadm.results", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("status", help="show which runs are done, running, waiting or failed")
    one.add_argument("sweep", nargs="?", help="name of a sweep; without it all")
    one.add_argument("--results", type=Path, default=DEFAULT_RESULTS, metavar="DIR", help="results set (%(default)s)")
    two = commands.add_parser("gc", help="show what the cache holds and remove what no record needs, after asking")
    two.add_argument(
        "--results",
        type=Path,
        action="append",
        metavar="DIR",
        help=f"folder of records, may be given again ({ALL_RESULTS})",
    )
    two.add_argument("--cache", type=Path, metavar="DIR", help="the cache (EDADM_CACHE, else ~/.cache/edadm)")
    two.add_argument("--partial", action="store_true", help="also remove what unfinished runs would go on from")
    two.add_argument("--yes", action="store_true", help="remove without asking")
    three = commands.add_parser("push-wandb", help="send records to Weights & Biases")
    three.add_argument("names", nargs="*", help="hashes (or their beginning) or sweeps; without them all records")
    three.add_argument(
        "--results", type=Path, action="append", metavar="DIR", help=f"may be given again ({DEFAULT_RESULTS})"
    )
    three.add_argument("--mode", choices=("online", "offline"), help="default: online if a key is known")
    return parser


if __name__ == "__main__":
    sys.exit(main())

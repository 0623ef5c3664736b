"""`python -m edadm.report`: tables from records."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from edadm.comparison import Draws, read_all_draws
from edadm.errors import EdadmError
from edadm.journal import read_sweeps
from edadm.records import Record, read_all
from edadm.report import claims, experiment_file, experiment_report, sheet
from edadm.report.diff import locate, render_diff
from edadm.report.figures import STEP_CURVE, step_curves
from edadm.report.ranks import no_contest, rank_lines, rank_sheets, ranks
from edadm.report.render import csv, latex, markdown, page
from edadm.report.table import tables
from edadm.report.verdicts import judge, verdict_lines, verdict_sheets
from edadm.store import write_atomically

LOCAL = Path("results/local")
DEFAULT_RESULTS = (Path("results/reference"), LOCAL)
SUFFIXES = {"csv": "csv", "latex": "tex", "html": "html", "markdown": "md"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    options = _parser().parse_args(argv)
    try:
        print(report(options), end="")
    except EdadmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def report(options: argparse.Namespace) -> str:
    """Return what the command prints: the table or the differences, or where the file was written."""
    folders = _folders(options)
    if options.experiments:
        return _output(experiment_report.experiment_list(folders, options.format), "experiments", options)
    if options.experiment in experiment_file.names():
        experiment = experiment_file.load(options.experiment, options.scale)
        made = experiment_report.report(experiment, folders, options.format, _out(options))
        return _output(made.text, experiment.name, options)
    if not folders:
        raise EdadmError(f"no results folder {LOCAL}: run `python run.py` first or name one with --results")
    records = read_all(folders)
    if options.diff:
        first, second = options.diff
        return render_diff(locate(first, records), locate(second, records))
    draws = read_all_draws(folders)
    if options.verdicts:
        judged = judge(claims.load(), records, draws)
        text = sheet.write(verdict_sheets(judged), verdict_lines(judged), options.format, "edadm: verdicts")
        return _output(text, "verdicts", options)
    if options.ranks:
        standings = ranks(records, draws)
        text = sheet.write(
            rank_sheets(standings) or [no_contest(records)], rank_lines(standings), options.format, "edadm: wins"
        )
        return _output(text, "ranks", options)
    chosen, waiting = _select(records, options.experiment, folders)
    name = re.sub(r"[^\w.=,-]", "_", options.experiment or "report")
    text = _render(chosen, draws, options.format, f"edadm: {options.experiment or 'all records'}")
    if options.format == "markdown":
        text += "".join(f"- Not run yet: `python run.py {label}`\n" for label in waiting)
    return _output(text, name, options)


def _folders(options: argparse.Namespace) -> list[Path]:
    """Return the folders with records: those named, which must be there, else the default ones that are."""
    if not options.results:
        return [folder for folder in DEFAULT_RESULTS if folder.is_dir()]
    for folder in options.results:
        if not folder.is_dir():
            raise EdadmError(f"no results folder {folder}: run `python run.py` first or name one with --results")
    return list(options.results)


def _out(options: argparse.Namespace) -> Path:
    """Return the folder of the files that are written."""
    return options.out or (options.results[0] if options.results else LOCAL) / "report"


def _output(text: str, name: str, options: argparse.Namespace) -> str:
    """Return Markdown as it is; write other formats, and Markdown with --out, to a file and return its path."""
    if options.format == "markdown" and options.out is None:
        return text
    path = write_atomically(_out(options) / f"{name}.{SUFFIXES[options.format]}", text)
    return f"{path}\n"


def _select(records: list[Record], experiment: str | None, folders: Sequence[Path]) -> tuple[list[Record], list[str]]:
    """Return the records of an experiment (a sweep's name; all without one) and the labels of its jobs without any."""
    sweeps = {sweep.name: sweep for folder in folders for sweep in read_sweeps(folder)}
    if experiment is None:
        chosen, waiting = records, []
    else:
        jobs = dict(sweeps[experiment].jobs) if experiment in sweeps else {}
        tasks = {record.task for record in records if record.hash in jobs or record.sweep == experiment}
        chosen = [
            record
            for record in records
            if record.hash in jobs or record.sweep == experiment or (record.is_fp and record.task in tasks)
        ]
        known = {record.hash for record in records}
        waiting = [label for hash, label in jobs.items() if hash not in known]
    if not chosen and not waiting:
        names = sorted(set(sweeps) | {record.sweep for record in records if record.sweep})
        known_names = f"; experiments here: {', '.join(names)}" if names else ""
        wanted = f" of experiment {experiment!r}" if experiment else ""
        raise EdadmError(
            f"no records{wanted} in {', '.join(map(str, folders))}{known_names}; tables and figures of the paper: "
            "`python -m edadm.report --experiments`"
        )
    return chosen, waiting


def _render(records: list[Record], draws: Mapping[str, Draws], style: str, title: str) -> str:
    found = tables(records, draws)
    if style == "csv":
        return csv(found)
    if style == "latex":
        return latex(found)
    if style == "markdown":
        return markdown(found)
    with tempfile.TemporaryDirectory() as folder:
        curves = [record for record in records if STEP_CURVE in record.metrics and record.status == "ok"]
        pictures = [("Error of every sampling step", step_curves(curves, Path(folder) / "steps.png"))] if curves else []
        return page(found, title, pictures)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m edadm.report", description="Render records as tables.")
    parser.add_argument(
        "experiment", nargs="?", help="table or figure of the paper, or name of a sweep; without it all records"
    )
    parser.add_argument("--experiments", action="store_true", help="list the tables and figures of the paper")
    parser.add_argument(
        "--scale",
        choices=experiment_file.SCALES,
        default=experiment_file.SCALES[0],
        help="of a table or figure: the embedded counterpart or the paper's tasks (default %(default)s)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        action="append",
        metavar="DIR",
        help=f"folder with records, may be given again (default {' and '.join(map(str, DEFAULT_RESULTS))})",
    )
    parser.add_argument(
        "--format",
        choices=sorted(SUFFIXES),
        default="markdown",
        help="markdown goes to the terminal, the others to a file",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the file (default <results>/report)")
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="show in what two records (hash or path) differ")
    parser.add_argument(
        "--verdicts", action="store_true", help="hold the ordered claims of the paper against the records"
    )
    parser.add_argument("--ranks", action="store_true", help="count how often each method wins")
    return parser


if __name__ == "__main__":
    sys.exit(main())

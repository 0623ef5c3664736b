"""`python -m edadm.report`: tables from records."""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from edadm.errors import EdadmError
from edadm.journal import read_sweeps
from edadm.records import Record, read_all
from edadm.report.diff import locate, render_diff
from edadm.report.figures import STEP_CURVE, step_curves
from edadm.report.render import csv, latex, markdown, page
from edadm.report.table import tables
from edadm.store import write_atomically

DEFAULT_RESULTS = Path("results/local")
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
    folders = options.results or [DEFAULT_RESULTS]
    for folder in folders:
        if not folder.is_dir():
            raise EdadmError(f"no results folder {folder}: run `python run.py` first or name one with --results")
    records = read_all(folders)
    if options.diff:
        first, second = options.diff
        return render_diff(locate(first, records), locate(second, records))
    chosen, waiting = _select(records, options.experiment, folders)
    name = re.sub(r"[^\w.=,-]", "_", options.experiment or "report")
    text = _render(chosen, options.format, f"edadm: {options.experiment or 'all records'}")
    if options.format == "markdown":
        text += "".join(f"- Not run yet: `python run.py {label}`\n" for label in waiting)
        if options.out is None:
            return text
    path = write_atomically((options.out or folders[0] / "report") / f"{name}.{SUFFIXES[options.format]}", text)
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
        raise EdadmError(f"no records{wanted} in {', '.join(map(str, folders))}{known_names}")
    return chosen, waiting


def _render(records: list[Record], style: str, title: str) -> str:
    found = tables(records)
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
    parser.add_argument("experiment", nargs="?", help="name of a sweep; without it all records")
    parser.add_argument(
        "--results",
        type=Path,
        action="append",
        metavar="DIR",
        help=f"folder with records, may be given again (default {DEFAULT_RESULTS})",
    )
    parser.add_argument(
        "--format",
        choices=sorted(SUFFIXES),
        default="markdown",
        help="markdown goes to the terminal, the others to a file",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the file (default <results>/report)")
    parser.add_argument("--diff", nargs=2, metavar=("A", "B"), help="show in what two records (hash or path) differ")
    return parser


if __name__ == "__main__":
    sys.exit(main())

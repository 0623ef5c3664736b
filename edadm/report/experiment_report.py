"""`python -m edadm.report <experiment>`: a table or figure of the paper from our records, and the list of all."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edadm.comparison import read_all_draws
from edadm.diagnostics.files import read_diagnostics
from edadm.errors import EdadmError
from edadm.records import Record, located
from edadm.report import sheet
from edadm.report.experiment_file import NOT_YET, SCALES, Experiment, load, missing_parts, names
from edadm.report.paper_rows import Found, find_rows
from edadm.report.paper_settings import settings_lines, settings_sheets
from edadm.report.paper_sheets import gaps, left_out, lines, run_label, sheets, subject
from edadm.report.paper_verdicts import compare
from edadm.report.sheet import Line, Note, Sheet


@dataclass(frozen=True)
class Report:
    """An experiment in one style; figures: the files that were drawn."""

    text: str
    figures: tuple[Path, ...] = ()


def report(experiment: Experiment, folders: Sequence[Path], style: str, out: Path) -> Report:
    """Return an experiment as Markdown, CSV, LaTeX or HTML from the records below some folders.

    out: the folder that receives the files of a figure.
    """
    title = f"{experiment.source}: {experiment.title}"
    if experiment.settings:
        return Report(sheet.write(settings_sheets(experiment), settings_lines(experiment), style, title))
    records = read_located(folders)
    rows, dropped = find_rows(experiment, records)
    if experiment.table:
        metrics = compare(experiment, rows, read_all_draws(folders))
        text = sheet.write(sheets(experiment, metrics, dropped), lines(experiment, metrics), style, title)
        return Report(text)
    return _figure(experiment, rows, dropped, folders, style, out)


def read_located(folders: Sequence[Path]) -> list[Record]:
    """Return the newest record of every hash; its outputs are absolute, so that figures find the files beside it."""
    return [
        dataclasses.replace(
            record, outputs={name: str(path.parent.absolute() / file) for name, file in record.outputs.items()}
        )
        for path, record in located(folders)
    ]


def _figure(
    experiment: Experiment,
    rows: Sequence[Found],
    dropped: Sequence[Record],
    folders: Sequence[Path],
    style: str,
    out: Path,
) -> Report:
    """Draw a figure from the records of its rows; without them say which run is missing."""
    runs = [record for found in rows for record in found.asked]
    drawn: list[Path] = []
    remarks = [*gaps(experiment, rows), *left_out(dropped)]
    if runs:
        try:
            drawn = _draw(str(experiment.figure), runs, folders, out)
        except EdadmError as error:
            remarks.append(Note(f"Not drawn ({error})", experiment.whole_command))
    remarks += [Note(f"Figure: {path}") for path in drawn]
    states = [_state(found) for found in rows]
    table = Sheet(
        heading=f"{experiment.source}: {experiment.title}",
        header=("run", "seeds", "state"),
        lines=tuple(
            Line((run_label(experiment, found.row), f"{len(found.asked)} of {len(found.row.seeds)}", state))
            for found, state in zip(rows, states, strict=True)
        ),
        notes=tuple(remarks),
        subtitle=subject(experiment),
    )
    listed = [
        {
            "experiment": experiment.name,
            "run": run_label(experiment, found.row),
            "state": state,
            "records": " ".join(_hashes(found)),
        }
        for found, state in zip(rows, states, strict=True)
    ]
    if style == "html":
        pictures = [(table.heading, path) for path in drawn if path.suffix == ".png"]
        return Report(sheet.page([table], table.heading, pictures), tuple(drawn))
    return Report(sheet.write([table], listed, style, table.heading), tuple(drawn))


def _draw(name: str, runs: Sequence[Record], folders: Sequence[Path], out: Path) -> list[Path]:
    from edadm.report.figure_registry import FIGURES

    if name not in FIGURES:
        raise EdadmError(f"{NOT_YET}: figure {name}")
    out.mkdir(parents=True, exist_ok=True)
    return FIGURES[name](runs, read_diagnostics(folders), out)


def _state(found: Found) -> str:
    if found.absent:
        return f"{NOT_YET}: {', '.join(found.absent)}"
    if found.missing_seeds:
        state = "partly run" if found.runs or found.failed else "not run"
    else:
        state = "run" if found.runs else ""
    return ", ".join(part for part in (state, found.lost) if part)


def _hashes(found: Found) -> list[str]:
    return [record.hash for record in found.runs.values()]


def experiment_list(folders: Sequence[Path], style: str) -> str:
    """Return all experiments: what the paper calls them, their tasks, and how many of their runs have records."""
    records = read_located(folders)
    rows = [_listed(name, records) for name in names()]
    table = Sheet(
        heading="Tables and figures of the paper",
        header=("experiment", "paper", "real tasks", "embedded counterpart", "its runs with a record"),
        lines=tuple(Line((*list(row.values())[:4], _progress(row))) for row in rows),
        notes=(
            Note(f"*: {NOT_YET}. A run that several experiments share counts in each."),
            Note("Run what an experiment lacks", "python run.py -m experiments=table6_ablation"),
            Note("Render it", "python -m edadm.report table6_ablation"),
        ),
    )
    return sheet.write([table], rows, style, table.heading)


def _listed(name: str, records: Sequence[Record]) -> Mapping[str, Any]:
    tiny, real = (load(name, scale) for scale in SCALES)
    found, _ = find_rows(tiny, records)
    runs = {tuple(sorted(one.row.words.items())): one for one in found if not one.row.is_fp and not one.absent}
    wanted = sum(len(one.row.seeds) for one in runs.values())
    words = [one.row.words for one in found] + [{"task": setting.task} for setting in tiny.settings]
    return {
        "experiment": name,
        "paper": tiny.source,
        "real_tasks": ", ".join(map(_marked, real.tasks)),
        "embedded": ", ".join(map(_marked, tiny.tasks)),
        "runs": None if tiny.settings else wanted,
        "with_record": None if tiny.settings else wanted - sum(len(one.missing_seeds) for one in runs.values()),
        "not_available_yet": ", ".join(dict.fromkeys(part for given in words for part in missing_parts(given))),
    }


def _progress(row: Mapping[str, Any]) -> str:
    absent = f"{NOT_YET}: {row['not_available_yet']}" if row["not_available_yet"] else ""
    done = "runs nothing" if row["runs"] is None else f"{row['with_record']} of {row['runs']}" if row["runs"] else ""
    return "; ".join(part for part in (done, absent) if part)


def _marked(task: str) -> str:
    return f"{task}*" if missing_parts({"task": task}) else task

"""Table VIII: the printed hyperparameters beside those in the files of each task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edadm.checkout import root
from edadm.report import paper
from edadm.report.experiment_file import NOT_YET, Experiment, missing_parts, same, text
from edadm.report.paper_verdicts import DIFFERS, REPRODUCED
from edadm.report.published import task_overrides
from edadm.report.sheet import Line, Note, Sheet

PROFILES = {"tiny": "reference", "paper": "paper"}  # that the tables of a scale run
GRANULARITY, OPTIMIZATION = "fbr", "joint"  # those that the paper's hyperparameters are for


def settings_lines(experiment: Experiment) -> list[dict[str, Any]]:
    """Return one mapping for each printed hyperparameter: the task, the printed value, ours and the verdict."""
    cells = paper.read(str(experiment.table))
    found = []
    for setting in experiment.settings:
        own = settings_of(setting.task, PROFILES[experiment.scale])
        for name, cell in paper.line_of(cells, setting.paper).items():
            value = None if own is None else own.get(name)
            verdict = f"{NOT_YET}: task {setting.task}" if value is None else DIFFERS
            verdict = REPRODUCED if value is not None and same(text(value), cell.value) else verdict
            found.append(
                {"row": cell.task, "task": setting.task, "name": name, "paper": cell.value, "ours": value}
                | {"verdict": verdict, "note": cell.note}
            )
    return found


def settings_of(task: str, profile: str) -> Mapping[str, Any] | None:
    """Return the hyperparameters of a task at a profile by their printed names, None without the task."""
    from omegaconf import OmegaConf

    conf = root() / "conf"
    if missing_parts({"task": task}):
        return None
    protocol = OmegaConf.load(conf / "task" / f"{task}.yaml").protocol
    numbers = OmegaConf.create({"protocol": protocol, "profile": OmegaConf.load(conf / "profile" / f"{profile}.yaml")})
    recipe: Any = OmegaConf.to_container(
        OmegaConf.load(conf / "recipe" / f"{task_overrides(conf, task)['recipe']}.yaml")
    )
    wanted = {"granularity": GRANULARITY, "optimization": OPTIMIZATION, "profile": profile}
    rows = [row for row in recipe["rows"] if all(value in row[key] for key, value in wanted.items())]
    return {
        "calibration_samples": numbers.profile.rows,
        "lambda1_TDAC": recipe["tdac"]["weight"],
        "lambda2_FBR": rows[0]["layer_loss_weight"] if rows else None,
    }


def settings_sheets(experiment: Experiment) -> list[Sheet]:
    """Return the hyperparameters as one table."""
    lines = settings_lines(experiment)
    notes = dict.fromkeys(line["note"] for line in lines if line["note"])
    return [
        Sheet(
            heading=f"{experiment.source}: {experiment.title}",
            subtitle=f"Ours are those of conf/task and conf/recipe at profile={PROFILES[experiment.scale]}.",
            header=("row of the paper", "task", "hyperparameter", "paper", "ours", "verdict"),
            lines=tuple(Line(tuple(str("" if line[key] is None else line[key]) for key in _COLUMNS)) for line in lines),
            notes=tuple(Note(f"Printed numbers: {note}.") for note in notes),
        )
    ]


_COLUMNS = ("row", "task", "name", "paper", "ours", "verdict")

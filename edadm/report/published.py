"""In what a run differs from its method as published: other parts, other numbers of them, or given files.

Rows of the paper, claims and ranks speak of methods as published; a run that is another one must not stand for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from edadm.checkout import root
from edadm.records import Record
from edadm.report.experiment_file import text
from edadm.report.labels import PLACES

GIVEN = ("load", "images", "calibration_set")  # files that stand for a part of the run
METHOD_PARTS = (
    "scope", "preset", "profile", "bits",
    "calibration", "transform", "ranges", "reconstruction", "optimization", "activation_sets", "correction",
)  # fmt: skip
ALL_PARTS = ("model", "dataset", "sampler", *METHOD_PARTS)
_FREE = ("profile.images", "profile.steps")  # tables keep runs apart by them: no property of the method
_PLACES = PLACES | {"calibration_prompts"}
_FP_PARTS = {"model": None, "dataset": None, "sampler": None, "profile": {"images", "steps"}}
_BRING_CALIBRATION_PROMPTS = ("drawbench_sd14",)  # which evaluate every prompt of their own
_RESOLVED_WITH = ("model", "preset", "profile", "protocol", "published", "ranges")


def is_published(record: Record, named: Iterable[str] = ()) -> bool:
    """Say whether a run is its method as published, but for the parts and numbers that are named."""
    if any(record.config.get(name) for name in GIVEN):
        return False
    allowed = {*named, *_FREE}
    return record.variant.keys() <= allowed and changed_numbers(record, METHOD_PARTS) <= allowed


def changed_numbers(record: Record, parts: Iterable[str] = ALL_PARTS) -> set[str]:
    """Return the numbers of a record's parts that are others than in the files of ``conf``, as ``sampler.eta``.

    A number that only one of them has is not compared, so that a part may get another one, and no place of a file,
    whose content the protocol knows. Other labels or prompts to calibrate with than the task's own count as well. Full
    precision depends on model, sampler and images only.
    """
    changed = set()
    for group, keys in (_FP_PARTS if record.is_fp else dict.fromkeys(parts, None)).items():
        recorded = record.config.get(group)
        if not isinstance(recorded, Mapping):
            continue
        own = _own_part(root() / "conf", group, word_of(record, group), _context(record))
        compared = (own.keys() & recorded.keys() & (own.keys() if keys is None else keys)) - _PLACES
        changed |= {f"{group}.{key}" for key in compared if own[key] != recorded[key]}
    return changed if record.is_fp else changed | _changed_calibration(record)


def _changed_calibration(record: Record) -> set[str]:
    """Return the settings by which a run calibrates with other labels or prompts than its task does by itself."""
    from omegaconf import OmegaConf

    conditions, prompts = "task.calibration_conditions", "dataset.calibration_prompts"
    changed = set()
    own = OmegaConf.select(task_file(root() / "conf", record.task), conditions)
    if own is not None and word_of(record, conditions) not in (own, "absent"):
        changed.add(conditions)
    if word_of(record, prompts) != "absent" and record.task not in _BRING_CALIBRATION_PROMPTS:
        changed.add(prompts)
    return changed


def _context(record: Record) -> str:
    """Return, as JSON, what the parts of a run are resolved with."""
    return json.dumps({"task": record.task} | {name: record.config.get(name) or {} for name in _RESOLVED_WITH})


@cache
def _own_part(conf: Path, group: str, name: str, context: str) -> dict[str, Any]:
    """Return the numbers of a file of ``conf`` as they resolve; one whose resolver is not known here is left out."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = conf / group / f"{name}.yaml"
    if not path.is_file():
        return {}
    values = json.loads(context)
    recipe = conf / "recipe" / f"{task_overrides(conf, values['task']).get('recipe')}.yaml"
    known = {"recipe": OmegaConf.load(recipe)} if recipe.is_file() else {}
    config = OmegaConf.create(values | known | {group: OmegaConf.load(path)})
    numbers = {}
    for key in config[group]:
        with suppress(OmegaConfBaseException):
            value = config[group][key]
            numbers[str(key)] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    return numbers


def task_overrides(conf: Path, task: str) -> dict[str, Any]:
    """Return the choices that a task's file makes in other groups, none for an unknown task."""
    from omegaconf import OmegaConf

    content: Any = OmegaConf.to_container(task_file(conf, task))
    return {name.removeprefix("override /"): value for name, value in choices(content.get("defaults", ())).items()}


@cache
def task_file(conf: Path, task: str) -> Any:
    """Return a task's file, empty for an unknown task."""
    from omegaconf import OmegaConf

    path = conf / "task" / f"{task}.yaml"
    return OmegaConf.load(path) if path.is_file() else OmegaConf.create()


def choices(defaults: Iterable[Any]) -> dict[str, Any]:
    """Return the group and choice of each entry of a defaults list."""
    return {name: value for entry in defaults if isinstance(entry, dict) for name, value in entry.items()}


def word_of(record: Record, key: str) -> str:
    """Return what a record says for a word of the command line, ``absent`` where it says nothing."""
    if key == "bits":
        return "fp" if record.is_fp else f"w{record.bits.weight}a{record.bits.act}"
    if key.startswith("recipe."):  # the recipe itself is not recorded, changes of it are
        return text(record.variant.get(key))
    if "." not in key and isinstance(known := getattr(record, key, None), str | int | float):
        return text(known)
    value: Any = record.config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):
        value = value.get("name")
    return "absent" if value is None else text(value)

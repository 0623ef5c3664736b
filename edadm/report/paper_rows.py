"""Which records belong to which row of an experiment."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from edadm.checkout import root
from edadm.comparison import newest_by_seed
from edadm.records import Record, date
from edadm.report.experiment_file import Experiment, Row, missing_parts, same, text
from edadm.report.labels import plain
from edadm.store import content_hash

_GIVEN = ("load", "images", "calibration_set")  # no run of a method
_SLOTS = ("calibration", "transform", "ranges", "reconstruction", "optimization", "activation_sets", "correction")
_PARTS = ("model", "dataset", "sampler", "bits", "scope", "preset", "profile", *_SLOTS)
_FP_PARTS = {"model": None, "dataset": None, "sampler": None, "profile": {"images", "steps"}}
_RESOLVED_WITH = ("model", "preset", "profile", "protocol", "published", "ranges")


@dataclass(frozen=True)
class Found:
    """The records of a row: the finished ones by seed, and how the others ended."""

    row: Row
    runs: Mapping[int, Record]
    failed: tuple[Record, ...] = ()
    absent: tuple[str, ...] = ()  # parts that the project does not have

    @property
    def missing_seeds(self) -> list[int]:
        """Return the seeds that the experiment asks for and no record has; full precision has no seed."""
        if self.row.is_fp:
            return [] if self.runs else [0]
        return [seed for seed in self.row.seeds if seed not in self.runs]


def find_rows(experiment: Experiment, records: Iterable[Record]) -> tuple[list[Found], list[Record]]:
    """Return the records of every row, and those left out because checkpoint or references are others.

    Rows are compared with each other, so all must be measured alike: as the newest record of the experiment.
    """
    everything = list(records)
    standards = {task: standard_words(task) for task in experiment.tasks}
    by_row = [
        [record for record in everything if belongs(record, row, standards[row.words["task"]])]
        for row in experiment.rows
    ]
    measured = [record for found in by_row for record in found if record.status == "ok"]
    kept, dropped = _measured_alike(measured)
    rows = []
    for row, found in zip(experiment.rows, by_row, strict=True):
        runs = newest_by_seed(record for record in found if record.hash in kept)
        failed = tuple(record for record in found if record.status != "ok" and record.seed not in runs)
        rows.append(Found(row, runs, failed, tuple(missing_parts(row.words))))
    return rows, dropped


def _measured_alike(records: Sequence[Record]) -> tuple[set[str], list[Record]]:
    """Return the hashes of the records with the newest yardstick of their task, and the other records."""
    newest: dict[str, Record] = {}
    for record in sorted(records, key=lambda record: (date(record), record.hash)):
        newest[record.task] = record
    kept = {record.hash for record in records if _yardstick(record) == _yardstick(newest[record.task])}
    return kept, list({record.hash: record for record in records if record.hash not in kept}.values())


def _yardstick(record: Record) -> str:
    """Return what the numbers of a record are measured with; rows may differ in the sampler."""
    return content_hash({name: value for name, value in plain(record.protocol).items() if name != "sampler"})


def standard_words(task: str) -> dict[str, str]:
    """Return the choices that hold in every row unless it names them, from ``conf/config.yaml`` and the task's file."""
    from omegaconf import OmegaConf

    conf = root() / "conf"
    config: Any = OmegaConf.to_container(OmegaConf.load(conf / "config.yaml"))
    chosen = _choices(config["defaults"]) | task_overrides(conf, task)
    values = {name: config[name] for name in ("precision", "evaluation_seed")}
    merged: Any = OmegaConf.merge(values, _task_file(conf, task))  # they may depend on the task's protocol
    words = {name: text(chosen[name]) for name in ("scope", "preset", "sampler")}
    return words | {name: text(merged[name]) for name in values}


def task_overrides(conf: Path, task: str) -> dict[str, Any]:
    """Return the choices that a task's file makes in other groups, none for an unknown task."""
    from omegaconf import OmegaConf

    content: Any = OmegaConf.to_container(_task_file(conf, task))
    return {name.removeprefix("override /"): value for name, value in _choices(content.get("defaults", ())).items()}


@cache
def _task_file(conf: Path, task: str) -> Any:
    from omegaconf import OmegaConf

    path = conf / "task" / f"{task}.yaml"
    return OmegaConf.load(path) if path.is_file() else OmegaConf.create()


def _choices(defaults: Iterable[Any]) -> dict[str, Any]:
    return {name: value for entry in defaults if isinstance(entry, dict) for name, value in entry.items()}


def belongs(record: Record, row: Row, standard: Mapping[str, str]) -> bool:
    """Say whether a record is a run of a row: in all its words, in the standard ones, and different in nothing else."""
    words = {**standard, **row.words}
    if record.is_fp is not row.is_fp or not all(same(word_of(record, key), value) for key, value in words.items()):
        return False
    images = (record.config.get("profile") or {}).get("images")
    if any(record.config.get(name) for name in _GIVEN) or record.n_images != images:
        return False
    return record.variant.keys() <= words.keys() and not (changed_numbers(record) - words.keys())


def changed_numbers(record: Record) -> set[str]:
    """Return the numbers of a record's parts that are others than in the files of ``conf``, as ``sampler.eta``.

    A number that only one of them has is not compared, so that a part may get another one. Full precision depends on
    model, sampler and images only.
    """
    changed = set()
    for group, keys in (_FP_PARTS if record.is_fp else dict.fromkeys(_PARTS, None)).items():
        recorded = record.config.get(group) or {}
        own = _own_part(root() / "conf", group, word_of(record, group), _context(record))
        compared = own.keys() & recorded.keys() & (own.keys() if keys is None else keys)
        changed |= {f"{group}.{key}" for key in compared if own[key] != recorded[key]}
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

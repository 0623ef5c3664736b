"""Which records belong to which row of an experiment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edadm.checkout import root
from edadm.comparison import newest_by_seed, newest_versions
from edadm.records import Record, date, device_kind
from edadm.report.experiment_file import Experiment, Row, missing_parts, same, text
from edadm.report.labels import counted, plain
from edadm.report.published import GIVEN, changed_numbers, choices, task_file, task_overrides, word_of
from edadm.store import content_hash


@dataclass(frozen=True)
class Found:
    """The records of a row: the finished ones by seed, and how seeds without one ended.

    absent: parts that the project does not have. older: metric and hash of the results of older versions, left out.
    """

    row: Row
    runs: Mapping[int, Record]
    failed: tuple[Record, ...] = ()
    absent: tuple[str, ...] = ()
    older: frozenset[tuple[str, str]] = frozenset()

    @property
    def missing_seeds(self) -> list[int]:
        """Return the seeds that the experiment asks for and no record has; full precision has no seed."""
        if self.row.is_fp:
            return [] if self.runs or self.failed else [0]
        ended = {record.seed for record in self.failed}
        return [seed for seed in self.row.seeds if seed not in self.runs and seed not in ended]

    @property
    def asked(self) -> list[Record]:
        """Return the runs of the seeds that the experiment asks for; full precision has no seed."""
        return [run for seed, run in self.runs.items() if self.row.is_fp or seed in self.row.seeds]

    @property
    def lost(self) -> str:
        """Return how many seeds ended without a result, as ``1 seed diverged``."""
        return counted(record.status for record in self.failed)


def find_rows(experiment: Experiment, records: Iterable[Record]) -> tuple[list[Found], list[Record]]:
    """Return the records of every row, and those left out because checkpoint, references or device are others.

    Rows are compared with each other, so all must be measured alike: as the newest record of the experiment.
    """
    everything = list(records)
    standards = {task: standard_words(task) for task in experiment.tasks}
    by_row = [
        [record for record in everything if belongs(record, row, standards[row.words["task"]])]
        for row in experiment.rows
    ]
    measured = [record for found in by_row for record in found if record.status == "ok"]
    alike, dropped = _measured_alike(measured)
    current, left = newest_versions(alike)
    kept = {record.hash: record for record in current}
    rows = []
    for row, found in zip(experiment.rows, by_row, strict=True):
        runs = newest_by_seed(kept[record.hash] for record in found if record.hash in kept)
        older = frozenset((name, record.hash) for record in found for name in left if record.hash in left[name])
        rows.append(Found(row, runs, _ended(found, runs), tuple(missing_parts(row.words)), older))
    return rows, dropped


def _ended(found: Iterable[Record], runs: Mapping[int, Record]) -> tuple[Record, ...]:
    """Return the newest record of every seed that has no finished one."""
    ordered = sorted(found, key=lambda record: (date(record), record.hash))
    return tuple(
        {record.seed: record for record in ordered if record.seed not in runs and record.status != "ok"}.values()
    )


def _measured_alike(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Return the records with the newest yardstick of their task, each once, and the other records."""
    newest: dict[str, Record] = {}
    for record in sorted(records, key=lambda record: (date(record), record.hash)):
        newest[record.task] = record
    kept: dict[str, Record] = {}
    others: dict[str, Record] = {}
    for record in records:
        alike = _yardstick(record) == _yardstick(newest[record.task])
        (kept if alike else others)[record.hash] = record
    return list(kept.values()), list(others.values())


def _yardstick(record: Record) -> str:
    """Return what the numbers of a record are measured with; rows may differ in the sampler and in guidance scale."""
    protocol = {name: value for name, value in plain(record.protocol).items() if name != "sampler"}
    if isinstance(guidance := protocol.get("guidance"), Mapping):
        protocol["guidance"] = {name: value for name, value in guidance.items() if name != "scale"}
    return content_hash([protocol, device_kind(record)])


def standard_words(task: str) -> dict[str, str]:
    """Return the choices that hold in every row unless it names them, from ``conf/config.yaml`` and the task's file."""
    from omegaconf import OmegaConf

    conf = root() / "conf"
    config: Any = OmegaConf.to_container(OmegaConf.load(conf / "config.yaml"))
    chosen = choices(config["defaults"]) | task_overrides(conf, task)
    values = {name: config[name] for name in ("precision", "evaluation_seed")}
    merged: Any = OmegaConf.merge(values, task_file(conf, task))  # they may depend on the task's protocol
    words = {name: text(chosen[name]) for name in ("scope", "preset", "sampler")}
    return words | {name: text(merged[name]) for name in values}


def belongs(record: Record, row: Row, standard: Mapping[str, str]) -> bool:
    """Say whether a record is a run of a row: in all its words, in the standard ones, and different in nothing else."""
    words = {**standard, **row.words}
    if record.is_fp is not row.is_fp or not all(same(word_of(record, key), value) for key, value in words.items()):
        return False
    images = (record.config.get("profile") or {}).get("images")
    if any(record.config.get(name) for name in GIVEN) or record.n_images != images:
        return False
    return record.variant.keys() <= words.keys() and not (changed_numbers(record) - words.keys())

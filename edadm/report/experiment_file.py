"""Experiment files: one YAML for each table and figure of the paper, ``experiments/<name>.yaml``.

The part under ``hydra`` is a sweep over the superset of a table's runs. The part under ``experiment`` says which line
of the printed table (columns of ``results/paper/table-<table>.csv``) comes from which words of the command line. These
rows decide which jobs of the superset run, and which records the report compares with the printed numbers.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from edadm.checkout import root
from edadm.errors import EdadmError

GROUP = "experiments"  # of Hydra, and the folder
CHOICE_WORDS = (GROUP, "scale")  # words that choose an experiment and say nothing about a run
SCALES = ("tiny", "paper")
NOT_YET = "not available yet"
FUTURE_GROUPS = ("deployment",)  # that experiment files name and ``conf`` need not have
FP = "fp"
_OF_THE_PAPER = re.compile(r"(table|fig)(\d+)(?:_(\d+))?(?=_|$)")


@dataclass(frozen=True)
class Row:
    """One line of a table or figure.

    run: the words that tell it from the other rows. words: all that make it, with task and profile. seeds: those the
    experiment asks for. paper: columns of the printed table that choose its cells, empty where the paper has none.
    point: where the row lies in a figure.
    """

    run: Mapping[str, str]
    words: Mapping[str, str]
    seeds: tuple[int, ...]
    paper: Mapping[str, str] = field(default_factory=dict)
    point: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_fp(self) -> bool:
        """Say whether the row is the full-precision model, which every other run makes for its table."""
        return self.run.get("method") == FP


@dataclass(frozen=True)
class Setting:
    """One line of a table of settings: the printed columns, and the task whose files are read."""

    paper: Mapping[str, str]
    task: str


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper at one scale; reference: the words of the row that effects are taken against."""

    name: str
    title: str
    scale: str
    table: str | None
    figure: str | None
    rows: tuple[Row, ...]
    settings: tuple[Setting, ...]
    reference: Mapping[str, str]
    seeds: tuple[int, ...]

    @property
    def source(self) -> str:
        """Return what the paper calls it."""
        return source_of(self.name)

    @property
    def tasks(self) -> list[str]:
        """Return the tasks of its rows in their order."""
        tasks = [row.words["task"] for row in self.rows] + [setting.task for setting in self.settings]
        return list(dict.fromkeys(tasks))

    def asks_for(self, words: Iterable[str]) -> bool:
        """Say whether a row asks for the job of these words; a seed that no row names is the user's own choice."""
        given = dict(word.lstrip("+").split("=", 1) for word in words if "=" in word)
        seed = int(given["seed"]) if given.get("seed", "").isdigit() else None
        for row in self.rows:
            own_seed = seed is None or seed in row.seeds or seed not in self.seeds
            if own_seed and all(key in given and same(given[key], value) for key, value in row.run.items()):
                return True
        return False

    def reference_of(self, row: Row) -> Row | None:
        """Return the row that the effect of a row is a difference to: equal words but those of the reference.

        Where two printed tables share a counterpart, the row of its own table.
        """
        if not self.reference or row.is_fp:
            return None
        wanted = {**row.run, **self.reference}
        found = [other for other in self.rows if dict(other.run) == wanted]
        own = [other for other in found if other.paper.get("task") == row.paper.get("task")]
        return next(iter(own or found), None)

    def command(self, row: Row, seeds: Sequence[int] = ()) -> str:
        """Return the command that makes a row (some seeds of it): the experiment, narrowed to what tells rows apart."""
        if row.is_fp:
            return shlex.join(["python", "run.py", *(f"{key}={value}" for key, value in row.words.items())])
        words = [f"{key}={value}" for key, value in row.run.items() if key in self.distinguishing]
        chosen = tuple(seeds) or row.seeds
        if chosen != self.seeds:
            words.append(f"seed={','.join(map(str, chosen))}")
        return " ".join([self.whole_command, *map(shlex.quote, words)])

    @property
    def whole_command(self) -> str:
        """Return the command that makes what the experiment lacks."""
        scale = [] if self.scale == SCALES[0] else [f"scale={self.scale}"]
        return shlex.join(["python", "run.py", "-m", f"{GROUP}={self.name}", *scale])

    @cached_property
    def distinguishing(self) -> frozenset[str]:
        """Return the keys of the words in which the rows of quantized models differ."""
        runs = [row.run for row in self.rows if not row.is_fp]
        keys = {key for run in runs for key in run}
        return frozenset(key for key in keys if len({run.get(key) for run in runs}) > 1)

    @property
    def shared_words(self) -> list[str]:
        """Return the words that all rows of quantized models have in common."""
        run = next((row.run for row in self.rows if not row.is_fp), {})
        return [f"{key}={value}" for key, value in run.items() if key not in self.distinguishing]


def text(value: Any) -> str:
    """Return a value as the command line writes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def same(one: str, other: str) -> bool:
    """Say whether two values of the command line are equal, as numbers if both are."""
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other


def names() -> list[str]:
    """Return the names of all experiments: tables, then figures, by number, then those beyond the paper."""

    def order(name: str) -> tuple[int, int, str]:
        match = _OF_THE_PAPER.match(name)
        return (("table", "fig").index(match[1]), int(match[2]), name) if match else (2, 0, name)

    return sorted((path.stem for path in (root() / GROUP).glob("*.yaml")), key=order)


def source_of(name: str) -> str:
    """Return what the paper calls an experiment (Table VI, Figure 10, Figures 12 and 13), or that it does not."""
    match = _OF_THE_PAPER.match(name)
    if match is None:
        return "Beyond the paper"
    kind, first, second = match.groups()
    if kind == "table":
        return f"Table {_roman(int(first))}"
    return f"Figure {first}" if second is None else f"Figures {first} and {second}"


def _roman(number: int) -> str:
    digits = {10: "X", 9: "IX", 5: "V", 4: "IV", 1: "I"}
    result = ""
    for value, letters in digits.items():
        while number >= value:
            result, number = result + letters, number - value
    return result


def load(name: str, scale: str = SCALES[0]) -> Experiment:
    """Return an experiment at a scale. Raises EdadmError naming the choices for an unknown name or scale."""
    path = root() / GROUP / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(names()) or f"none in {path.parent}, they belong to the checkout (EDADM_ROOT names it)"
        raise EdadmError(f"no experiment {name!r}; there are: {known}")
    if scale not in SCALES:
        raise EdadmError(f"scale={scale}: choose {' or '.join(SCALES)}")
    node = _resolved(path, scale)
    return Experiment(
        name=name,
        title=node["title"],
        scale=scale,
        table=node.get("table"),
        figure=node.get("figure"),
        rows=tuple(row for block in node.get("blocks", ()) for row in _rows(block, node["at"], scale)),
        settings=tuple(Setting(_texts(line["paper"]), line["task"]) for line in node.get("settings", ())),
        reference=_texts(node.get("reference", {})),
        seeds=_seeds(node["at"].get("seed", 0)),
    )


def _resolved(path: Path, scale: str) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf

    content = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    config = OmegaConf.create({"experiment": content["experiment"], "scale": scale})
    resolved: Any = OmegaConf.to_container(config, resolve=True)
    return dict(resolved["experiment"])


def _rows(block: Mapping[str, Any], at: Mapping[str, Any], scale: str) -> Iterable[Row]:
    if block.get("only", scale) != scale:
        return
    shared = {key: text(at[key]) for key in ("task", "profile") if key in at}
    for row in block["rows"]:
        run = _texts(block.get("run", {})) | _texts(row.get("run", {}))
        yield Row(
            run=run,
            words=shared | run,
            seeds=_seeds(row.get("seed", block.get("seed", at["seed"]))),
            paper=_texts(block.get("paper", {})) | _texts(row["paper"]) if "paper" in row else {},
            point=row.get("point", {}),
        )


def _texts(node: Mapping[Any, Any]) -> dict[str, str]:
    return {str(key): text(value) for key, value in node.items()}


def _seeds(value: Any) -> tuple[int, ...]:
    return tuple(int(seed) for seed in str(value).split(","))


def missing_parts(words: Mapping[str, str], checkout: Path | None = None) -> list[str]:
    """Return what the words of a run name that the project does not have, as ``method ptqd``."""
    conf = (checkout or root()) / "conf"
    absent = []
    for group, name in words.items():
        known = (conf / group).is_dir()
        if (known and not (conf / group / f"{name}.yaml").is_file()) or (not known and group in FUTURE_GROUPS):
            absent.append(f"{group} {name}")
    return absent

"""The printed numbers of the paper, ``results/paper/*.csv``, and which metric of a record stands for each."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from edadm.checkout import root
from edadm.errors import EdadmError
from edadm.records import Record
from edadm.report.claims import CLAIMS

PRINTED = Path("results/paper")
FRIENDLY = "Friendly"
COSTS = ("Bops_G", "ModelSize_MB", "Hardware_x")  # counted from the network, without any sampling error
FLOATING = 16  # bits from which a tensor is not quantized


@dataclass(frozen=True)
class Cell:
    """One printed cell; ``value`` is its text, ``n`` the images behind it, ``note`` what is doubtful about it."""

    table: str
    row: str
    task: str
    method: str
    bits: str
    metric: str
    value: str
    n: str
    note: str

    @property
    def number(self) -> float | None:
        """Return the printed number, None for a dash or a word."""
        try:
            return float(self.value)
        except ValueError:
            return None

    @property
    def images(self) -> int | None:
        """Return the number of images behind it, None where it is not known."""
        return int(self.n) if self.n else None


def read(table: str) -> list[Cell]:
    """Return the cells of a printed table. Raises EdadmError when its file is not there."""
    path = root() / PRINTED / f"table-{table}.csv"
    if not path.is_file():
        raise EdadmError(f"no printed numbers at {path}: they belong to the checkout (EDADM_ROOT names it)")
    with open(path, encoding="utf-8", newline="") as file:
        return [Cell(**line) for line in csv.DictReader(file)]


def line_of(cells: Iterable[Cell], columns: Mapping[str, str]) -> dict[str, Cell]:
    """Return the printed line that some columns choose, by metric; a task is chosen by its beginning.

    Raises EdadmError when no line has the columns, or two have.
    """
    found = [cell for cell in cells if all(_chosen(cell, name, value) for name, value in columns.items())]
    line = {cell.metric: cell for cell in found}
    if not found or len(line) < len(found):
        wanted = ", ".join(f"{name}={value}" for name, value in columns.items())
        raise EdadmError(f"{'no' if not found else 'more than one'} printed line has {wanted}")
    return line


def _chosen(cell: Cell, name: str, value: str) -> bool:
    text = str(getattr(cell, name))
    return text.startswith(value) if name == "task" else text == value


def stand_in(metric: str, records: Iterable[Record]) -> str | None:
    """Return the metric of the records that stands for a printed one, by ``results/paper/claims.yaml``."""
    if metric in COSTS or metric == FRIENDLY:
        return metric
    measured = {name for record in records for name in record.metrics}
    return next((name for name in _stand_ins(root() / CLAIMS).get(metric.lower(), ()) if name in measured), None)


@cache
def _stand_ins(path: Path) -> dict[str, tuple[str, ...]]:
    from omegaconf import OmegaConf

    return {str(name).lower(): tuple(own) for name, own in OmegaConf.load(path).metrics.items()}


def value_of(record: Record, metric: str) -> float | None:
    """Return a metric of a record by its own name, or a cost by the paper's; None where it has none.

    Source of the costs: EDA-DM, Table X: bit operations in 10^9, size in 10^6 bytes, and the sets of activation
    parameters that a quantizer has.
    """
    if metric in COSTS:
        return _cost(record, metric)
    value = record.metrics.get(metric, {}).get("value")
    return None if value is None else float(value)


def _cost(record: Record, metric: str) -> float | None:
    if not record.cost:
        return None
    if metric == "Bops_G":
        return float(record.cost["bit_operations"]) / 1e9
    if metric == "ModelSize_MB":
        return float(record.cost["size_mb"])
    quantizers = sum(site["kind"] != "weight" and site["bits"] < FLOATING for site in record.sites)
    return record.cost["act_parameter_sets"] / quantizers if quantizers else None


def is_friendly(record: Record) -> bool:
    """Say whether a method has one set of activation parameters and adds nothing to the sampler.

    The computable form of the paper's mark; the mark itself follows no rule that reproduces all of its labels.
    """
    return record.activation_sets == "static" and record.correction == "none"

"""How far the demo's metrics move from seed to seed, so that a metric that moved by more is found.

    python -m experiments.demo_band commands demo         # prints the runs behind a band
    python -m experiments.demo_band make demo FOLDER      # writes results/bands/demo.json from their records
    python -m experiments.demo_band check demo FOLDER     # compares records with it; exit code 1 outside of it

``demo`` is what ``make demo`` runs, ``quick`` a reduced run that the tests repeat. A band is the 99 % prediction
interval of one more run: mean -+ t s (1 + 1/S)^(1/2) over S seeds. Full precision has no seed of its own; its band is
over evaluation seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edadm.errors import EdadmError
from edadm.records import Record, provenance, read_all
from edadm.store import write_atomically

SCHEMA = 1
LEVEL = 0.99
SEEDS = 5
BANDS = Path(__file__).resolve().parents[1] / "results" / "bands"
RESULTS = "build/band"  # outside of the sets of results that tables read; ignored by git
FP_SEEDS = 2001  # the first evaluation seed of full precision
PROTOCOLS: dict[str, dict[str, tuple[str, ...]]] = {
    "demo": {
        "seed": ("method=rtn,qdiffusion,edadm", "bits=w4a8", "profile=demo", "logger=none"),
        "evaluation_seed": ("method=fp", "profile=demo", "logger=none"),
    },
    "quick": {
        "seed": (
            "method=rtn,edadm", "bits=w4a8", "profile=demo", "profile.rows=16", "profile.batch=8",
            "profile.iterations=2", "sampler.steps=20", "n_images=1", "chunk=8", "metrics.names=[sqnr]",
            "metrics.sqnr_rows=8", "threads=1", "device=cpu", "logger=none",
        ),
    },
}  # fmt: skip
"""What varies in the runs behind a band, and their words on the command line."""
NUMBERS = ("rows", "batch", "iterations", "range_batches")  # of a profile
Interval = tuple[float, float]


@dataclass(frozen=True)
class Band:
    """The values of every metric of every method over seeds.

    protocol: what the runs share. runs: the hashes of their records.
    """

    name: str
    values: dict[str, dict[str, list[float]]]
    protocol: dict[str, Any]
    runs: list[str]
    provenance: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def interval(self, row: str, metric: str) -> Interval:
        """Return where one more run of a row is expected."""
        from scipy.special import stdtrit

        values = self.values[row][metric]
        spread = float(np.std(values, ddof=1)) * math.sqrt(1 + 1 / len(values))
        half = float(stdtrit(len(values) - 1, (1 + LEVEL) / 2)) * spread
        return float(np.mean(values)) - half, float(np.mean(values)) + half


def commands(name: str) -> list[str]:
    """Return the commands of the runs behind a band."""
    found = []
    for varied, words in PROTOCOLS[name].items():
        first = FP_SEEDS if varied == "evaluation_seed" else 0
        seeds = ",".join(str(first + number) for number in range(SEEDS))
        found.append(shlex.join(["python", "run.py", "-m", *words, f"{varied}={seeds}", f"results={RESULTS}/{name}"]))
    return found


def make(name: str, records: Iterable[Record]) -> Band:
    """Return the band of the records of several seeds. Raises EdadmError for too few or for runs that do not match."""
    chosen = [record for record in records if record.status == "ok" and _counts(name, record)]
    if len(protocols := {json.dumps(_shared(record), sort_keys=True): _shared(record) for record in chosen}) != 1:
        raise EdadmError(f"{len(chosen)} runs with {len(protocols)} protocols: a band needs runs that differ in seeds")
    values: dict[str, dict[str, list[float]]] = {}
    for record in sorted(chosen, key=lambda record: (record.method, record.seed, _seed(record))):
        for metric, value in _values(record).items():
            values.setdefault(record.method, {}).setdefault(metric, []).append(value)
    found = Counter(record.method for record in chosen if _values(record))
    if any(found[row] < SEEDS for row in _rows(name)):
        raise EdadmError(f"a band needs {SEEDS} seeds of every row, found {dict(found)}: {' and '.join(_again(name))}")
    (protocol,) = protocols.values()
    return Band(name, values, protocol, sorted(record.hash for record in chosen), provenance())


def _rows(name: str) -> list[str]:
    """Return the methods of a band."""
    return [method for words in PROTOCOLS[name].values() for method in words[0].partition("=")[2].split(",")]


def complaints(band: Band, records: Iterable[Record]) -> list[str]:
    """Return what is wrong with the metrics of some runs, a line for each that is outside of the band or missing."""
    runs = [record for record in records if record.method in band.values or not record.is_fp]
    absent = band.values.keys() - {record.method for record in runs}
    return [f"{row}: no record" for row in sorted(absent)] + [line for run in runs for line in _complaints(band, run)]


def _complaints(band: Band, record: Record) -> list[str]:
    row, values = record.method, _values(record)
    if record.status != "ok" or row not in band.values:
        return [f"{row}: {record.reason or 'not a row of the band'}"]
    if _shared(record) != band.protocol:
        return [f"{row}: the band is of another model or protocol; measure it again: {' and '.join(_again(band.name))}"]
    return [line for metric in band.values[row] if (line := _outside(band, row, metric, values.get(metric)))]


def _outside(band: Band, row: str, metric: str, value: float | None) -> str | None:
    (low, high), n = band.interval(row, metric), len(band.values[row][metric])
    if value is not None and low <= value <= high:
        return None
    found = "not measured" if value is None else f"{value:.5g}"
    return f"{row} {metric} is {found}, expected in [{low:.5g}, {high:.5g}], the seed noise of {n} runs"


def _again(name: str) -> list[str]:
    return [*commands(name), f"python -m experiments.demo_band make {name} {RESULTS}/{name}"]


def _counts(name: str, record: Record) -> bool:
    """Say whether a run belongs to a band; of full precision only those on evaluation seeds of their own do."""
    return not record.is_fp or ("evaluation_seed" in PROTOCOLS[name] and _seed(record) >= FP_SEEDS)


def _seed(record: Record) -> int:
    return int(record.protocol["evaluation_seed"])


def _shared(record: Record) -> dict[str, Any]:
    """Return what the runs of a band share: model, references, sampling; not the noise."""
    same = {name: value for name, value in record.protocol.items() if name != "evaluation_seed"}
    profile = record.config["profile"]
    return same | {
        "task": record.task,
        "images": record.config["n_images"],
        **{name: profile[name] for name in NUMBERS},
    }


def _values(record: Record) -> dict[str, float]:
    results = ((name, result.get("value")) for name, result in record.metrics.items())
    return {name: float(value) for name, value in results if value is not None}


def write(band: Band, folder: Path = BANDS) -> Path:
    """Write a band and return its file."""
    return write_atomically(folder / f"{band.name}.json", json.dumps(dataclasses.asdict(band), indent=1) + "\n")


def read(path: Path) -> Band:
    """Return the band in a file. Raises EdadmError naming the file if it holds none."""
    try:
        data: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] > SCHEMA:
            raise ValueError(f"schema {data['schema']}, this version reads up to {SCHEMA}")
        return Band(**data)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EdadmError(f"{path} holds no band: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("commands", "make", "check"))
    parser.add_argument("name", choices=tuple(PROTOCOLS))
    parser.add_argument("results", nargs="*", type=Path, help="folders with records")
    options = parser.parse_args(argv)
    try:
        if options.what == "commands":
            print("\n".join(_again(options.name)))
        elif options.what == "make":
            print(write(make(options.name, read_all(options.results))))
        else:
            found = complaints(read(BANDS / f"{options.name}.json"), read_all(options.results))
            print("\n".join(found) or "every metric lies within the seed noise")
            return 1 if found else 0
    except EdadmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Records of runs of an experiment, made from their words without running anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edadm import config
from edadm.comparison import Draws, MetricDraws
from edadm.records import Bits, Record
from edadm.report.experiment_file import Row
from edadm.store import content_hash
from tests.report.records_for_tests import metric

PROTOCOL = {"sampler": {"steps": 20}, "evaluation_seed": 1234, "checkpoint": "c" * 16}
COST = {"bit_operations": 3e10, "size_mb": 7.0, "act_parameter_sets": 4}
SITES = [{"kind": kind, "bits": 8} for kind in ("weight", "input", "input", "q", "k")]


def made(words: list[str], metrics: Mapping[str, Any] | None = None, **fields: Any) -> Record:
    """Return the record that a run of these words would leave, with given metrics."""
    values = config.settings(config.compose(words), words)
    full_precision = values["method"] == "fp"
    bits = Bits("fp", 32, 32, 32) if full_precision else Bits(values.bits_name, **dict(values["bits"]))
    filled: dict[str, Any] = {
        "hash": content_hash(sorted(words)),
        "task": values["task.name"],
        "method": values["method"],
        "bits": bits,
        "scope": values["scope.name"],
        "preset": values["preset.name"],
        "profile": values["profile.name"],
        "seed": values["seed"],
        "n_images": values["n_images"],
        "precision": values["precision"],
        "calibration": values["calibration.name"],
        "reconstruction": values["reconstruction.name"],
        "variant": dict(values.variant),
        "overrides": words,
        "protocol": PROTOCOL,
        "config": {name: value for name, value in values.values.items() if name not in ("recipe", "results")},
        "metrics": dict(metrics or {}),
        "cost": COST,
        "sites": SITES,
        "provenance": {"date": "2026-11-21T10:00:00+00:00"},
    }
    return Record(**(filled | fields))


def run_of(row: Row, seed: int = 0, metrics: Mapping[str, Any] | None = None, **fields: Any) -> Record:
    """Return a record of a row of an experiment."""
    return made([f"{key}={value}" for key, value in row.words.items()] + [f"seed={seed}"], metrics, **fields)


def scored(fd: float, n: int = 2000, **more: Any) -> dict[str, Any]:
    """Return the metrics of a run with one Frechet distance."""
    return {"fd_tiny": metric(fd, n=n, proxy=True), "sqnr": metric(20 - fd, higher=True, n=32, unit="dB")} | more


def draws_of(record: Record, name: str = "fd_tiny", spread: float = 0.01) -> Draws:
    """Return the resampled metric of a record, spread evenly around its value."""
    value, n = record.metrics[name]["value"], record.metrics[name]["n"]
    around = tuple(value + spread * (index - 50) / 50 * (1 if record.hash < "8" else -1) for index in range(101))
    return Draws(record.hash, record.task, 1, 1, {name: MetricDraws(value, n, 1, around)})

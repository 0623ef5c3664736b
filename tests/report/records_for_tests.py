"""Records made by hand, for the tests of what reads them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from edadm.comparison import Draws, MetricDraws
from edadm.records import Bits, Record, Stage
from edadm.store import content_hash

BITS = {"w4a8": Bits("w4a8", 4, 8), "w8a8": Bits("w8a8", 8, 8), "fp": Bits("fp", 32, 32, 32)}
PROTOCOL = {"sampler": "ddim", "steps": 20, "eta": 0.0, "reference": {"name": "cifar10 train", "sha256": "a" * 64}}


def metric(value: float | None, higher: bool = False, n: int = 2048, **more: Any) -> dict[str, Any]:
    """Return a metric result as the metrics write it."""
    return {"value": value, "n": n, "reason": None, "interval": None, "higher_is_better": higher} | more


def record(
    method: str = "edadm",
    seed: int = 0,
    bits: str = "w4a8",
    fd: float | None = 10.0,
    sqnr: float | None = 20.0,
    config: dict[str, Any] | None = None,
    **fields: Any,
) -> Record:
    """Return a plausible record; its hash follows from what is given, as that of a run follows from its config."""
    config = {"method": method, "bits": bits, "seed": seed, "steps": 20} | (config or {})
    n, profile, variant = fields.get("n_images", 2048), fields.get("profile", "reference"), fields.get("variant", {})
    words = ["task=toy", f"method={method}", f"bits={bits}", f"profile={profile}", f"seed={seed}"]
    filled: dict[str, Any] = {
        "hash": content_hash([config, fields.get("profile"), n, fields.get("task"), fields.get("scope")]),
        "task": "toy",
        "method": method,
        "bits": BITS[bits],
        "scope": "full",
        "preset": "released",
        "profile": "reference",
        "seed": seed,
        "n_images": n,
        "config": config,
        "protocol": PROTOCOL,
        "overrides": [*words, *(f"{name}={value}" for name, value in variant.items())],
        "metrics": {"fd_tiny": metric(fd, n=n, proxy=True), "sqnr": metric(sqnr, higher=True, n=n, unit="dB")},
        "stages": {
            "calibration": Stage(5.0, 300.0),
            "reconstruction": Stage(60.0 + seed, 900.0),
            "sampling": Stage(40.0),
        },
        "provenance": {"date": f"2026-11-21T10:00:{seed:02d}+00:00"},
    }
    return Record(**(filled | fields))


def fp(fd: float = 5.0, **fields: Any) -> Record:
    """Return the full-precision row of the toy task."""
    return record("fp", bits="fp", fd=fd, sqnr=None, **({"stages": {}} | fields))


def resampled(records: Iterable[Record], spread: float = 0.1) -> dict[str, Draws]:
    """Return draws of every metric of some records, by hash: their values with a noise of their own."""
    found = {}
    for number, run in enumerate(records):
        noise = spread * np.random.default_rng(number).standard_normal(100)
        metrics = {
            name: MetricDraws(result["value"], result["n"], 1, tuple(result["value"] + noise - noise.mean()))
            for name, result in run.metrics.items()
            if result.get("value") is not None
        }
        found[run.hash] = Draws(run.hash, run.task, 1234, 1, metrics)
    return found

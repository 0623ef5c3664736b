"""Paired differences between runs, with an interval that covers images and seeds; what would decide an open one.

A run's draws are its metrics under resampled images, equal resamples for every run on one evaluation noise
(``results/<set>/<task>/draws/<hash>.json``, written by `edadm.compare`). Records and draws are all that a difference
needs. docs/statistics.md says what the interval covers and how that was checked. Light to import: reports use it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from edadm.errors import EdadmError
from edadm.records import DRAWS, Record, path_of
from edadm.store import write_atomically

logger = logging.getLogger(__name__)

SCHEMA = 1
LEVEL = 0.95
POWER = 0.8
RESAMPLED = (
    "fd_tiny", "sfd_tiny", "is_tiny", "fd_tiny_to_fp", "sqnr", "psnr", "ssim", "fid", "sfid", "is", "kid", "fd_dinov2",
    "clip", "clip_tiny", "aesthetic",
)  # by `edadm.metrics.draws`  # fmt: skip
FEW_SEEDS = 3  # below, no difference between methods is a finding
DIGITS = 7  # significant digits kept of a draw
MOST_SEEDS, MOST_IMAGES = 100, 1_000_000  # beyond, a design is not worth naming


@dataclass(frozen=True)
class MetricDraws:
    """A metric of n images (or trajectories), and its values in the resamples; version: of the metric."""

    value: float
    n: int
    version: int
    draws: tuple[float, ...]


@dataclass(frozen=True)
class Draws:
    """The resampled metrics of one run; two runs pair up where seed, version and n of the resampling are equal."""

    hash: str
    task: str
    seed: int
    version: int
    metrics: dict[str, MetricDraws]
    provenance: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA


def draws_path(record_path: Path) -> Path:
    """Return the file of the draws of the record in a file."""
    return record_path.parent / DRAWS / record_path.name


def write_draws(draws: Draws, results_dir: Path) -> Path:
    """Write draws beside the record of their run and return the path."""
    data = dataclasses.asdict(draws)
    for metric in data["metrics"].values():
        metric["draws"] = [float(f"{value:.{DIGITS}g}") for value in metric["draws"]]
    path = draws_path(path_of(results_dir, draws.task, draws.hash))
    return write_atomically(path, json.dumps(data, allow_nan=False) + "\n")


def read_draws(path: Path) -> Draws:
    """Return the draws in a file. Raises EdadmError naming the file if it holds none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] > SCHEMA:
            raise ValueError(f"schema {data['schema']}, this version reads up to {SCHEMA}: update edadm")
        metrics = {
            name: MetricDraws(**(entry | {"draws": tuple(map(float, entry["draws"]))}))
            for name, entry in data["metrics"].items()
        }
        return Draws(**(data | {"metrics": metrics}))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise EdadmError(f"{path} holds no draws: {error}") from error


def read_all_draws(folders: Iterable[Path]) -> dict[str, Draws]:
    """Return the draws below some results folders by the hash of their run; a broken file is skipped with a warning."""
    found: dict[str, Draws] = {}
    for path in (path for folder in folders for path in sorted(Path(folder).rglob(f"{DRAWS}/*.json"))):
        try:
            draws = read_draws(path)
        except EdadmError as error:
            logger.warning("skipped: %s", error)
            continue
        found[draws.hash] = draws
    return found


@dataclass(frozen=True)
class Difference:
    """A metric of one method minus that of another, over the seeds that both have.

    value: mean over seeds. bias: what finitely many images add to it, by the bootstrap. image_error: standard error of
    the mean over another n images. seed_deviation: standard deviation of the difference over seeds, None for one.
    level: mean of the metric of the second method.
    """

    value: float
    n: int
    seeds: tuple[int, ...]
    image_error: float
    seed_deviation: float | None
    bias: float
    level: float
    resamples: int

    @property
    def half_width(self) -> float:
        """Half of the interval: its parts by images and by seeds, added in quadrature."""
        return _half_width(self, len(self.seeds), self.n)

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference, both at this n and without the bias of finite n."""
        corrected = self.value - self.bias
        return min(self.value, corrected) - self.half_width, max(self.value, corrected) + self.half_width

    @property
    def sign(self) -> int:
        """The sign of a difference whose interval excludes zero, else 0."""
        low, high = self.interval
        return (low > 0) - (high < 0)

    @property
    def finding(self) -> int:
        """The sign of a difference that seeds support too, else 0: with fewer than FEW_SEEDS nothing is found."""
        return self.sign if len(self.seeds) >= FEW_SEEDS else 0

    @property
    def covers(self) -> str:
        """What another experiment may draw anew within the interval."""
        return "images" if self.seed_deviation is None else "images and seeds"


def difference(
    first: Mapping[int, Record], second: Mapping[int, Record], metric: str, draws: Mapping[str, Draws]
) -> Difference | None:
    """Return the paired difference of a metric between two methods, each given by the record of every seed.

    None where no seed has the metric on both sides, where it was measured in several versions, or where the draws of a
    record are missing or of another resampling; `no_difference` tells these apart.
    """
    if no_difference(first, second, metric):
        return None
    seeds = _shared_seeds(first, second, metric)
    pairs = [_paired_draws(draws.get(first[seed].hash), draws.get(second[seed].hash), metric) for seed in seeds]
    known = [pair for pair in pairs if pair is not None]
    if not seeds or len(known) < len(seeds) or len({(pair.n, len(pair.draws)) for pair in known}) > 1:
        return None
    values = np.array([_value(first[seed], metric) - _value(second[seed], metric) for seed in seeds])
    sampled = np.mean([pair.draws for pair in known], axis=0)
    n = known[0].n
    return Difference(
        value=float(values.mean()),
        n=n,
        seeds=tuple(seeds),
        # the resamples of n images have the variance of the mean times (n - 1) / n
        image_error=float(sampled.std(ddof=1)) * math.sqrt(n / (n - 1)),
        seed_deviation=float(values.std(ddof=1)) if len(seeds) > 1 else None,
        bias=float(sampled.mean()) - float(np.mean([pair.value for pair in known])),
        level=float(np.mean([_value(second[seed], metric) for seed in seeds])),
        resamples=len(sampled),
    )


def no_difference(first: Mapping[int, Record], second: Mapping[int, Record], metric: str) -> str:
    """Return why the records themselves allow no difference, an empty string where only draws can be missing."""
    if not first.keys() & second.keys():
        return "the sides share no seed"
    seeds = _shared_seeds(first, second, metric)
    if not seeds:
        return f"no seed has {metric} on both sides"
    found = {metric_version(side[seed].metrics[metric]) for seed in seeds for side in (first, second)}
    if len(found) > 1:
        return f"{metric} was measured in versions {', '.join(map(str, sorted(found)))}: run the older ones again"
    return ""


def _shared_seeds(first: Mapping[int, Record], second: Mapping[int, Record], metric: str) -> list[int]:
    return [seed for seed in sorted(first.keys() & second.keys()) if _both(first[seed], second[seed], metric)]


def metric_version(result: Any) -> int:
    """Return the version of a metric's result, 0 where it names none; results of two versions are on two scales."""
    return int(result.get("version") or 0) if isinstance(result, Mapping) else 0


def newest_versions(records: Iterable[Record]) -> tuple[list[Record], dict[str, list[str]]]:
    """Return records without the results of an older version of a metric than the newest among them.

    Also returned: by metric, the hashes of the records whose result is left out.
    """
    everything = list(records)
    newest: dict[str, int] = {}
    for name, result in (item for record in everything for item in record.metrics.items()):
        newest[name] = max(newest.get(name, 0), metric_version(result))
    kept, left = [], defaultdict(list)
    for record in everything:
        old = [name for name, result in record.metrics.items() if metric_version(result) < newest[name]]
        for name in old:
            left[name].append(record.hash)
        metrics = {name: result for name, result in record.metrics.items() if name not in old}
        kept.append(dataclasses.replace(record, metrics=metrics) if old else record)
    return kept, dict(left)


def versions_note(left: Mapping[str, Collection[str]]) -> list[str]:
    """Return what to say of the results that `newest_versions` left out."""
    return [
        f"{name}: {len(hashes)} result{'s' if len(hashes) > 1 else ''} of an older version of the metric left out"
        for name, hashes in left.items()
    ]


def newest_by_seed(records: Iterable[Record]) -> dict[int, Record]:
    """Return the finished record of every seed; of several the newest counts."""
    done = (record for record in records if record.status == "ok")
    ordered = sorted(done, key=lambda record: (str(record.provenance.get("date", "")), record.hash))
    return {record.seed: record for record in ordered}


@dataclass(frozen=True)
class Design:
    """What would find a difference of the measured size with 80 % power; None: no affordable number does."""

    seeds: int | None  # at this n
    images: int | None  # at these seeds
    both: int | None  # factor on seeds and images together

    def __str__(self) -> str:
        ways = [f"{self.seeds} seeds"] if self.seeds else []
        ways += [f"{self.images:,} images"] if self.images else []
        if ways:
            return " or ".join(ways)
        return f"{self.both} times as many seeds and images" if self.both else "none within reach: take it as a tie"


def deciding_design(found: Difference, target: float = 0.0) -> Design | None:
    """Return the seeds or images that would tell a difference from target if it is as large as measured.

    By the measured variances: that of images falls as 1 / images, that of seeds as 1 / seeds. None with a single seed,
    which shows no variance. The nearer to target of the values at this n and without the bias of finite n counts.
    """
    if found.seed_deviation is None:
        return None
    gaps = (found.value - target, found.value - found.bias - target)
    effect = min(map(abs, gaps)) if gaps[0] * gaps[1] > 0 else 0.0
    least = max(len(found.seeds), FEW_SEEDS)

    def enough(seeds: int, n: float) -> bool:
        variance = found.image_error**2 * found.n / n + found.seed_deviation**2 / seeds  # type: ignore[operator]
        return effect >= _half_width(found, seeds, n) + _normal_quantile(POWER) * math.sqrt(variance)

    seeds = next((seeds for seeds in range(least, MOST_SEEDS + 1) if enough(seeds, found.n)), None)
    images = next((n for n in _round_numbers_above(found.n) if enough(least, n)), None)
    both = next((times for times in range(2, 51) if enough(least * times, found.n * times)), None)
    return Design(seeds, images, both)


def _round_numbers_above(n: int) -> list[int]:
    """Return the numbers above n that are worth naming: ten for each power of ten."""
    steps = [round(step * 10**power) for power in range(1, 7) for step in (1, 1.25, 1.6, 2, 2.5, 3.2, 4, 5, 6.4, 8)]
    return [step for step in steps if n < step <= MOST_IMAGES]


def _half_width(found: Difference, seeds: int, n: float) -> float:
    """Return the half width that as many seeds and images would give by the measured variances."""
    freedom = min(found.n, found.resamples) - 1
    by_images = _t_quantile(freedom) * found.image_error * math.sqrt(found.n / n)
    if found.seed_deviation is None:
        return by_images
    return math.hypot(by_images, _t_quantile(seeds - 1) * found.seed_deviation / math.sqrt(seeds))


@cache
def _t_quantile(freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))


@cache
def _normal_quantile(probability: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(probability))


@dataclass(frozen=True)
class _Pair:
    value: float
    n: int
    draws: np.ndarray


def _paired_draws(first: Draws | None, second: Draws | None, metric: str) -> _Pair | None:
    """Return the difference of two runs in every resample, None where they were not resampled alike."""
    if first is None or second is None or (first.seed, first.version) != (second.seed, second.version):
        return None
    a, b = first.metrics.get(metric), second.metrics.get(metric)
    if a is None or b is None or (a.n, a.version, len(a.draws)) != (b.n, b.version, len(b.draws)):
        return None
    return _Pair(a.value - b.value, a.n, np.subtract(a.draws, b.draws))


def _both(first: Record, second: Record, metric: str) -> bool:
    values = [record.metrics.get(metric, {}).get("value") for record in (first, second)]
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _value(record: Record, metric: str) -> float:
    return float(record.metrics[metric]["value"])

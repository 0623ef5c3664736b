"""`python -m edadm.compare`: resample the finished runs of a results folder and show their paired differences.

A run's draws are made from its cached images and features once, next to its record; from then on every difference
between two runs follows from their records and draws (`edadm.comparison`). A run without cached images is skipped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from edadm import stages
from edadm.comparison import RESAMPLED, Draws, MetricDraws, draws_path, read_all_draws, read_draws, write_draws
from edadm.errors import EdadmError
from edadm.metrics import networks, tiny
from edadm.metrics.draws import KEPT, VERSION, Evaluation
from edadm.metrics.inception_network import RELEASE_SHA256, find_weights
from edadm.metrics.references import content_of
from edadm.metrics.registry import INCEPTION, METRICS, TINY
from edadm.records import Record, Stage, path_of, provenance, read_all
from edadm.report import sheet
from edadm.report.contrasts import REFERENCE
from edadm.report.labels import base_label
from edadm.report.render import differences
from edadm.report.table import family, tables
from edadm.store import Store, defect, file_sha256

logger = logging.getLogger(__name__)

DEFAULT_RESULTS = (Path("results/reference"), Path("results/local"))
REMEDY = "runs of profiles with verdicts keep them: run it again with another results=FOLDER"
SAME = 1e-3  # relative; the same images give the same metric but for rounding


class NotResampled(EdadmError):
    """A run has no draws; the message is the reason."""


def complete(
    wanted: Iterable[Record], results_dir: Path, store: Store, other_results: Iterable[Path] = ()
) -> list[str]:
    """Write the draws that finished runs of a results set lack; return a line for what stays without any.

    other_results: sets that may hold the record of the full-precision model too.
    """
    missing = [(record, names) for record in wanted if (names := without_draws(record, results_dir))]
    everything = read_all([results_dir, *other_results]) if missing else []
    skipped = []
    for record, names in missing:
        lost = [name for name in names if name in KEPT and not _has_kept(record, store)]
        who = f"{base_label(record)} {record.bits.name} seed {record.seed} ({record.hash[:8]})"
        if len(lost) < len(names):
            try:
                made = resample(record, _full_precision(record, everything), store)
                write_draws(_with_old(made, results_dir), results_dir)
            except EdadmError as error:
                skipped.append(f"{who}: {error}")
                continue
        if lost:
            skipped.append(f"{who}, {', '.join(lost)}: no features in the cache {store.root}, where {REMEDY}")
    return skipped


def without_draws(record: Record, results_dir: Path) -> list[str]:
    """Return the metrics of a run that can be resampled and have no draws of their version."""
    draws, names = _written_draws(record.task, record.hash, results_dir), resampled_metrics(record)
    if draws is None or draws.version != VERSION:
        return names
    return [name for name in names if not _is_current(name, draws.metrics.get(name))]


def _written_draws(task: str, hash: str, results_dir: Path) -> Draws | None:
    path = draws_path(path_of(results_dir, task, hash))
    try:
        return read_draws(path) if path.is_file() else None
    except EdadmError:
        return None


def _is_current(name: str, found: MetricDraws | None) -> bool:
    return found is not None and name in METRICS and found.version == METRICS[name].version


def _with_old(made: Draws, results_dir: Path) -> Draws:
    """Return draws with those in their file that still hold: their images and features may be gone from the cache."""
    old = _written_draws(made.task, made.hash, results_dir)
    if old is None or (old.seed, old.version) != (made.seed, made.version):
        return made
    kept = {name: found for name, found in old.metrics.items() if _is_current(name, found)}
    return dataclasses.replace(made, metrics=kept | made.metrics)


def resample(record: Record, full_precision: Record, store: Store) -> Draws:
    """Return the draws of a run from its cached images and features, of every metric whose features were kept.

    Raises NotResampled where the images are missing or others.
    """
    kept = stages.read_kept(_cached(record, store, "metrics")) if _has_kept(record, store) else {}
    names = [name for name in resampled_metrics(record) if name not in KEPT or KEPT[name] in kept]
    images = stages.read_images(_cached(record, store, "images"))
    steps = stages.read_sqnr(_cached(record, store, "sqnr")) if "sqnr" in names else None
    fp_images = _cached(full_precision, store, "images").folder
    settings = json.dumps(record.config.get("metrics", {}), sort_keys=True)
    evaluation = _evaluation(fp_images, _sources(record, names), settings, record.protocol["evaluation_seed"])
    found = evaluation.resample(images, names, steps, kept)
    for name, result in found.items():
        recorded = record.metrics[name]["value"]
        if not math.isclose(result.value, recorded, rel_tol=SAME, abs_tol=1e-6):
            raise NotResampled(f"its cached images have {name} {result.value:.6g}, its record says {recorded:.6g}")
    metrics = {
        name: MetricDraws(result.value, result.n, METRICS[name].version, tuple(result.draws.tolist()))
        for name, result in found.items()
    }
    return Draws(record.hash, record.task, evaluation.seed, VERSION, metrics, provenance())


def resampled_metrics(record: Record) -> list[str]:
    """Return the metrics of a run that are resampled; images from a folder share no noise with other runs."""
    if record.status != "ok" or record.method == "images":
        return []
    results = {name: result for name, result in record.metrics.items() if name in RESAMPLED}
    return [name for name, result in results.items() if result.get("value") is not None and (result.get("n") or 0) > 1]


def _has_kept(record: Record, store: Store) -> bool:
    return (store.root / "metrics" / record.artefacts.get("metrics", "-") / stages.KEPT).is_file()


def _full_precision(record: Record, everything: Iterable[Record]) -> Record:
    """Return the full-precision run on the same noise."""
    if record.is_fp:
        return record
    found = [other for other in everything if other.is_fp and other.status == "ok" and family(other) == family(record)]
    if not found:
        raise NotResampled("no record of the full-precision model on the same noise")
    return found[-1]


def _cached(record: Record, store: Store, stage: str) -> stages.Result:
    """Return a finished stage of a run from the cache."""
    folder = store.root / stage / record.artefacts.get(stage, "-")
    if not folder.is_dir():
        whose = "the full-precision run" if record.is_fp else "the run"
        raise NotResampled(
            f"{whose} has no {stage} in the cache {store.root}; run it again with another results=FOLDER"
        )
    if (reason := defect(folder)) is not None:
        raise NotResampled(f"{folder} is broken: {reason}")
    return stages.Result(stage, folder, Stage(None), {})


def _sources(record: Record, names: Collection[str]) -> tuple[str, ...]:
    """Return what a run's metrics are compared with: tiny, inception, dinov2. Raises NotResampled where it changed."""
    settings, protocol = record.config.get("metrics", {}), record.protocol
    found: dict[str, Any] = {}
    if any(name in TINY for name in names):
        path = _tiny_reference(settings)
        found["tiny"] = path.is_file() and {"features": file_sha256(tiny.WEIGHTS), "reference": file_sha256(path)}
    if any(name in INCEPTION and name != "is" for name in names):
        part = settings["inception"]
        weights = find_weights(part["weights"], part["sha256"] or RELEASE_SHA256)[1]
        found["inception"] = {"weights": weights, "reference": content_of(part["reference"], settings["crop"])}
    if "fd_dinov2" in names:
        found |= networks.identities(settings, ["fd_dinov2"], None)
    for name, identity in found.items():
        if identity != protocol.get(name):
            raise NotResampled(f"it was measured with another feature network or other reference statistics ({name})")
    return tuple(found)


def _tiny_reference(settings: Mapping[str, Any]) -> Path:
    return Path(settings.get("reference") or tiny.REFERENCE).expanduser()


@lru_cache(maxsize=1)
def _evaluation(fp_images: Path, sources: tuple[str, ...], settings: str, seed: int) -> Evaluation:
    """Return what all runs on one noise share; kept, since runs of one sweep come one after the other.

    settings: the group ``metrics`` as JSON.
    """
    part = json.loads(settings)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Evaluation(
        fp_images=stages.read_images(stages.Result("images", fp_images, Stage(None), {})),
        reference=tiny.load_reference(_tiny_reference(part)) if "tiny" in sources else None,
        network=tiny.load_network(device=device) if "tiny" in sources else None,
        seed=seed,
        inception=stages.inception_of(part, part["names"], device)[1] if "inception" in sources else None,
        dinov2=networks.load(part, ["fd_dinov2"], device).reference if "dinov2" in sources else None,
        device=device,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    options = _parser().parse_args(argv)
    folders = options.results or [folder for folder in DEFAULT_RESULTS if read_all([folder])]
    try:
        print(compare(folders, Store(options.cache), options.to), end="")
    except EdadmError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def compare(folders: Sequence[Path], store: Store, to: str = REFERENCE) -> str:
    """Resample what is missing and return the paired differences of every table as text, and what was skipped."""
    skipped: list[str] = []
    for folder in folders:
        found = [record for record in read_all([folder]) if path_of(folder, record.task, record.hash).is_file()]
        if not found:
            raise EdadmError(f"no records in {folder}: name a set of results such as {DEFAULT_RESULTS[0]}")
        skipped += complete(found, folder, store, folders)
    if not folders:
        raise EdadmError(f"no results in {' or '.join(map(str, DEFAULT_RESULTS))}: run `python run.py` first")
    records = read_all(folders)
    labels = sorted({row.label for table in tables(records) for row in table.rows if not row.is_fp})
    if to not in (*labels, REFERENCE):
        raise EdadmError(f"--to {to}: no such row; there are {', '.join(labels)}")
    made = tables(records, read_all_draws(folders), to)
    text = sheet.markdown([one for table in made for one in differences(table)])
    return text + "".join(f"- Not resampled: {line}\n" for line in skipped)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m edadm.compare", description="Show the paired differences of finished runs."
    )
    parser.add_argument(
        "--results",
        type=Path,
        action="append",
        metavar="DIR",
        help=f"a set of results, may be given again (default {' and '.join(map(str, DEFAULT_RESULTS))})",
    )
    parser.add_argument("--to", default=REFERENCE, metavar="ROW", help="the row to compare with (default %(default)s)")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="the cache (EDADM_CACHE, else ~/.cache/edadm)")
    return parser


if __name__ == "__main__":
    sys.exit(main())

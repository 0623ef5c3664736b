"""`python -m edadm.compare`: resample the finished runs of a results folder and show their paired differences.

A run's draws are made from its cached images once, next to its record; from then on every difference between two runs
follows from their records and draws (`edadm.comparison`). A run whose images are no longer cached is skipped.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from edadm import stages
from edadm.comparison import RESAMPLED, Draws, MetricDraws, draws_path, read_all_draws, read_draws, write_draws
from edadm.errors import EdadmError
from edadm.metrics import tiny
from edadm.metrics.draws import VERSION, Evaluation
from edadm.metrics.registry import METRICS
from edadm.records import Record, Stage, path_of, provenance, read_all
from edadm.report import sheet
from edadm.report.contrasts import REFERENCE
from edadm.report.labels import base_label
from edadm.report.render import differences
from edadm.report.table import family, tables
from edadm.store import Store, defect, file_sha256

logger = logging.getLogger(__name__)

DEFAULT_RESULTS = (Path("results/reference"), Path("results/local"))
SAME = 1e-3  # relative; the same images give the same metric but for rounding


class NotResampled(EdadmError):
    """A run has no draws; the message is the reason."""


def complete(
    wanted: Iterable[Record], results_dir: Path, store: Store, other_results: Iterable[Path] = ()
) -> list[str]:
    """Write the draws that finished runs of a results set lack; return a line for each run that stays without any.

    other_results: sets that may hold the record of the full-precision model too.
    """
    missing = [record for record in wanted if resampled_metrics(record) and not has_draws(record, results_dir)]
    everything = read_all([results_dir, *other_results]) if missing else []
    skipped = []
    for record in missing:
        try:
            write_draws(resample(record, _full_precision(record, everything), store), results_dir)
        except EdadmError as error:
            skipped.append(f"{base_label(record)} {record.bits.name} seed {record.seed} ({record.hash[:8]}): {error}")
    return skipped


def has_draws(record: Record, results_dir: Path) -> bool:
    """Say whether the draws of a run are there, for every metric that can be resampled and of its version."""
    path = draws_path(path_of(results_dir, record.task, record.hash))
    try:
        draws = read_draws(path) if path.is_file() else None
    except EdadmError:
        return False
    if draws is None or draws.version != VERSION:
        return False
    versions = {name: metric.version for name, metric in draws.metrics.items()}
    return all(versions.get(name) == METRICS[name].version for name in resampled_metrics(record))


def resample(record: Record, full_precision: Record, store: Store) -> Draws:
    """Return the draws of a run from its cached images. Raises NotResampled where they are missing or others."""
    names = resampled_metrics(record)
    images = stages.read_images(_cached(record, store, "images"))
    steps = stages.read_sqnr(_cached(record, store, "sqnr")) if "sqnr" in names else None
    fp_images = _cached(full_precision, store, "images").folder
    reference = _reference(record) if any(METRICS[name].proxy for name in names) else None
    evaluation = _evaluation(fp_images, reference, record.protocol["evaluation_seed"])
    found = evaluation.resample(images, names, steps)
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


def _reference(record: Record) -> Path:
    """Return the file of the reference statistics with which a record was made."""
    path = Path(record.config.get("metrics", {}).get("reference") or tiny.REFERENCE).expanduser()
    expected = record.protocol.get("tiny", {})
    if not path.is_file() or expected != {"features": file_sha256(tiny.WEIGHTS), "reference": file_sha256(path)}:
        raise NotResampled("its proxies were measured with another feature network or other reference statistics")
    return path


@lru_cache(maxsize=1)
def _evaluation(fp_images: Path, reference: Path | None, seed: int) -> Evaluation:
    """Return what all runs on one noise share; kept, since runs of one sweep come one after the other."""
    images = stages.read_images(stages.Result("images", fp_images, Stage(None), {}))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if reference is None:
        return Evaluation(images, None, None, seed)
    return Evaluation(images, tiny.load_reference(reference), tiny.load_network(device=device), seed)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    options = _parser().parse_args(argv)
    folders = options.results or [folder for folder in DEFAULT_RESULTS if folder.is_dir()]
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
    made = tables(read_all(folders), read_all_draws(folders), to)
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

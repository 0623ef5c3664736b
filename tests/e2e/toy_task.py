"""The embedded task with a toy network, so small that a whole run takes a second."""

from __future__ import annotations

from pathlib import Path

from edadm import config, experiment
from edadm.keys import Run

SMALL = (
    "task=cifar10_tiny", "profile=demo", "profile.rows=8", "profile.batch=4", "profile.iterations=3", "profile.range_batches=2",
    "sampler.steps=4", "n_images=6", "chunk=4", "metrics.names=[sqnr,psnr,ssim]", "metrics.sqnr_rows=4", "threads=1", "device=cpu",
)  # fmt: skip


def words(model: Path, results: Path, *more: str) -> list[str]:
    """The command line of a toy run; later words win."""
    given = {word.split("=")[0] for word in more}
    small = [word for word in SMALL if word.split("=")[0] not in given]
    return [*small, f"model.path={model}", f"results={results}", *more]


def prepare(model: Path, results: Path, *more: str) -> Run:
    line = words(model, results, *more)
    return experiment.prepare(config.settings(config.compose(line), line))

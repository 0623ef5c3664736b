"""The picture beside a record: samples of the run, above them those of full precision from the same noise."""

from __future__ import annotations

import logging
from pathlib import Path

from edadm import records, stages
from edadm.keys import Run
from edadm.metrics.images import comparison_grid, grid

logger = logging.getLogger(__name__)


def draw(run: Run, sampled: stages.Result, reference: stages.Result | None) -> dict[str, str]:
    """Draw the samples of a run, reference: those of full precision; return the outputs of its record."""
    path = records.path_of(run.results, run.task.name, run.hash).with_suffix(".png")
    return {"grid": path.name} if _draw(path, sampled, reference) else {}


def draw_again(run: Run, baseline: Run | None, record: Path) -> None:
    """Draw the lost picture of a made run, as in a fresh clone, where the cache still has the images.

    baseline: the full-precision run on the same noise. record: the file of the run's record.
    """
    path = record.with_suffix(".png")
    needed = [run] if baseline is None else [run, baseline]
    if any(one.store.find("images", one.key("images")) is None for one in needed):
        return
    try:
        drawn = _draw(path, stages.images(run, None), None if baseline is None else stages.images(baseline, None))
    except OSError as error:
        logger.warning("%s: %s cannot be drawn: %s", run.settings.label, path, error)
    else:
        if drawn:
            logger.info("%s: drew %s again", run.settings.label, path)


def _draw(path: Path, sampled: stages.Result, reference: stages.Result | None) -> bool:
    made = stages.read_images(sampled)
    if not len(made):
        return False
    if reference is None:
        grid(made[:16], path)
    else:
        comparison_grid(stages.read_images(reference), made, path)
    return True

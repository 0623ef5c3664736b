"""The diagnostics by name, and how those that a run asks for are made."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edadm.diagnostics import (
    activation_range,
    reconstruction_loss,
    sample_distribution,
    scores,
    soft_rounding,
)
from edadm.diagnostics.files import Diagnostic, find_diagnostic, write_diagnostic
from edadm.diagnostics.inputs import Inputs, no_errors_of_the_same_steps, no_reconstruction, no_rounding, no_sampling
from edadm.errors import EdadmError
from edadm.keys import Run
from edadm.progress import Progress, duration
from edadm.records import provenance

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """How one diagnostic is made.

    measure: returns JSON types with ``n`` and ``unit`` among them. lacking: why a run cannot have it, None if it can.
    version: raised when the numbers change; files of another version are made again.
    """

    measure: Callable[[Inputs], dict[str, Any]]
    lacking: Callable[[Run], str | None]
    version: int = 1


DIAGNOSTICS = {
    "activation_range": Measurement(activation_range.measure, no_sampling),
    "reconstruction_loss": Measurement(reconstruction_loss.measure, no_reconstruction),
    "sample_distribution": Measurement(sample_distribution.measure, no_sampling),
    "scores": Measurement(scores.measure, no_errors_of_the_same_steps),
    "soft_rounding": Measurement(soft_rounding.measure, no_rounding),
}


def check(names: Any) -> None:
    """Raise EdadmError for names that are no list of known diagnostics."""
    if not isinstance(names, list):
        raise EdadmError(f"diagnostics={names}: give a list, for example diagnostics=[{next(iter(DIAGNOSTICS))}]")
    unknown = [str(name) for name in names if name not in DIAGNOSTICS]
    if unknown:
        raise EdadmError(f"diagnostics has {', '.join(unknown)}: choose from {', '.join(DIAGNOSTICS)}")


def diagnose(run: Run) -> list[Path]:
    """Make the diagnostics that a run asks for, unless they are there, and return their files.

    One that does not apply to the run is left out with a warning that says why.
    """
    with Progress(run.settings.label) as progress:
        source = Inputs(run, progress)
        found = [_diagnose(source, name) for name in run.settings["diagnostics"]]
    return [path for path in found if path is not None]


def _diagnose(source: Inputs, name: str) -> Path | None:
    run, measurement = source.run, DIAGNOSTICS[name]
    if reason := measurement.lacking(run):
        logger.warning("%s does not apply to %s: %s", name, run.settings.label, reason)
        return None
    folders = [run.results, *run.references]
    path = find_diagnostic(folders, run.task.name, run.hash, name, measurement.version)
    if path is not None:
        logger.info("%s [%s]: %s is there", name, run.settings.label, path.name)
        return path
    started = time.perf_counter()
    values = measurement.measure(source)
    seconds = time.perf_counter() - started
    made = Diagnostic(name, measurement.version, run.hash, run.task.name, values, seconds, provenance(run.device))
    logger.info("%s [%s]: %s", name, run.settings.label, duration(seconds))
    return write_diagnostic(made, run.results)

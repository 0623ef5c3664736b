"""The calibration samplers of ``conf/calibration`` as a run would use them, whichever the run itself uses."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from edadm import config
from edadm.keys import Run
from edadm.parts import build_part


def row_sampler(run: Run, name: str) -> Any:
    """Return the sampler of that name, with the run's own numbers if it is the run's and its task's otherwise."""
    if run.settings["calibration.name"] == name:
        return run.calibration
    words = [word for word in run.settings.overrides if not word.lstrip("+~").startswith("calibration")]
    words.append(f"calibration={name}")
    composed = config.with_task_of_pair(config.compose(words), words)
    part = OmegaConf.to_container(composed.calibration, resolve=True)
    assert isinstance(part, dict)
    return build_part({str(key): value for key, value in part.items()})

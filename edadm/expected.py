"""Which scores full precision should reach: the task's, as long as images and scores are made as the task has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from edadm.config import Settings, has_own_sampler, own_of_task
from edadm.metrics.registry import INCEPTION, TINY
from edadm.tasks.base import Task

# the settings of the group metrics that a score depends on
MEASURED_WITH = {
    **dict.fromkeys(INCEPTION, ("crop", "inception.reference", "inception.sha256")),
    **dict.fromkeys(TINY, ("reference",)),
    "clip": ("crop", "clip.model", "clip.pretrained", "clip.prompts"),
    "aesthetic": ("crop", "aesthetic.head"),
}
BROUGHT = ("inception.reference",)  # by the user, where the task names none
PLACES_OF_MODEL = ("path", "first_stage")  # of the weights that a task needs


def band_of(settings: Settings, task: Task) -> dict[str, tuple[float, float]]:
    """Return lowest and highest score by metric, without those that are of other images or measured otherwise."""
    if settings["profile.name"] != task.expected_profile or not _has_own_images(settings):
        return {}
    own = _plain(own_of_task(settings).metrics)
    return {
        name: band for name, band in task.expected_band.items() if _is_measured_alike(name, settings["metrics"], own)
    }


def _has_own_images(settings: Settings) -> bool:
    """Say whether as many images are made as the task has them, in the same way; their weights are the user's."""
    own = own_of_task(settings)
    same_model = _without_places(settings["model"]) == _without_places(_plain(own.model))
    return settings["n_images"] == own.n_images and same_model and has_own_sampler(settings)


def _without_places(model: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if key not in PLACES_OF_MODEL}


def _is_measured_alike(name: str, chosen: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Say whether a score is measured with the settings that the task has in the group ``metrics``."""
    for setting in MEASURED_WITH.get(name, ()):
        wanted = _value(own, setting)
        if _value(chosen, setting) != wanted and not (setting in BROUGHT and wanted is None):
            return False
    return True


def _value(metrics: Mapping[str, Any], setting: str) -> Any:
    section, _, key = setting.rpartition(".")
    return (metrics.get(section, {}) if section else metrics).get(key)


def _plain(part: Any) -> dict[str, Any]:
    values: Any = OmegaConf.to_container(part, resolve=True)
    return dict(values)

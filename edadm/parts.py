"""From the configuration to the parts of a run: a class called with its numbers, sampler and guidance of a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from edadm.errors import EdadmError
from edadm.sampling.guidance import Guidance
from edadm.sampling.interface import NOISE, DiffusionSampler, fitted
from edadm.tasks.base import Own, Task

DEFAULT_SAMPLER = "edadm.sampling.ddim.Sampler"  # of a sampler's configuration that names no class
OWN = "own"  # the sampler that a user's pipeline brings itself

Key = dict[str, Any]


def build_part(part: Mapping[str, Any]) -> Any:
    """Instantiate a part of the configuration: ``_target_`` called with the other entries but ``name``.

    Raises EdadmError for an entry that the part does not have.
    """
    from hydra.utils import get_object

    target = get_object(part["_target_"])
    numbers = {key: value for key, value in part.items() if key not in ("name", "_target_")}
    if dataclasses.is_dataclass(target):
        known = [field.name for field in dataclasses.fields(target) if field.name != "version"]
        if unknown := [key for key in numbers if key not in known]:
            name = part.get("name", part["_target_"])
            raise EdadmError(f"{name} has no {', '.join(unknown)}: what can be set is {', '.join(known)}")
    return target(**numbers)


def identity(part: Any) -> Key:
    """Return what a part contributes to a key: its class and where that is defined, its version and its numbers.

    What a sampler's network predicts is named where it is not noise.
    """
    numbers = dataclasses.asdict(part)
    if numbers.get("prediction_type") == NOISE:
        del numbers["prediction_type"]
    return {"part": f"{type(part).__module__}.{type(part).__qualname__}", "version": part.version, **numbers}


def build_sampler(part: Mapping[str, Any], task: Task) -> DiffusionSampler:
    """Return the sampler of a configuration. Raises EdadmError when it does not fit what the model predicts."""
    own = task.own
    if part["name"] == OWN:
        if own is None:
            task.location()
            raise EdadmError(f"sampler={OWN} is that of a user's pipeline, and this is task {task.name}")
        sampler = own.sampler(part["steps"], float(part["eta"]))
    else:
        numbers = {key: value for key, value in part.items() if key != "guidance_scale"}
        sampler = build_part({"_target_": DEFAULT_SAMPLER} | (numbers if own is None else _filled(numbers, own)))
    return fitted(sampler, task.prediction_type, task.learned_variance)


def build_guidance(part: Mapping[str, Any], task: Task) -> Guidance | None:
    """Return the guidance of a sampler's configuration, None for an unconditional model.

    Raises EdadmError when an unconditional model is to be guided.
    """
    own, scale = task.own, part.get("guidance_scale", 1.0)
    if own is not None:  # 1 and less mean none, as in a call of the pipeline
        scale = 1.0 if own.embeds_guidance else max(1.0, own.guidance_scale if scale is None else scale)
    scale = float(scale)
    if task.conditions is not None:
        return Guidance(task.conditions(), scale, task.guided_channels)
    if scale != 1:
        raise EdadmError(
            f"sampler.guidance_scale={scale:g}, but the model of task {task.name} is unconditional: there is nothing "
            "to guide it with, set it to 1"
        )
    return None


def _filled(numbers: Key, own: Own) -> Key:
    """Return the numbers of a sampler with those of the pipeline's training where they are open.

    Raises EdadmError naming those that the pipeline does not say either.
    """
    from hydra.utils import get_object

    part = get_object(numbers.get("_target_", DEFAULT_SAMPLER))
    taken = {field.name for field in dataclasses.fields(part)}
    filled = {**own.schedule, **{key: value for key, value in numbers.items() if value is not None}}
    if unknown := [key for key in numbers if key.startswith("beta_") and key in taken and key not in filled]:
        raise EdadmError(
            f"sampler={numbers['name']} needs {', '.join(unknown)}, which the pipeline's scheduler does not have: use "
            f"sampler={OWN}, or give the numbers of the training"
        )
    return {key: value for key, value in filled.items() if key in taken or key in ("name", "_target_")}

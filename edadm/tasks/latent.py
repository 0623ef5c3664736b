"""The paper's latent diffusion tasks: LSUN-Bedroom, LSUN-Church and class-conditional ImageNet.

``model.path`` is the original checkpoint file, or the folder that `edadm.tasks.ldm_checkpoint.save_ldm` wrote of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edadm.errors import EdadmError
from edadm.sampling.generate import truncated_to_uint8
from edadm.sampling.guidance import ClassConditions, Conditions
from edadm.tasks.base import Task, bands
from edadm.tasks.ldm_checkpoint import LDM_MODELS, LdmParams, load_autoencoder, load_class_embedding, load_unet
from edadm.tasks.released import CONDITIONS, as_released

DECODED_AT_ONCE = 8  # latents: a 512 x 512 image takes about 1.5 GB on its way through the decoder


@dataclass(frozen=True)
class FirstStage:
    """The decoder of an autoencoder whose ``config.scaling_factor`` is the factor of its latents.

    load: reads it, with its ``decode``. to_bytes: from pixels; by default they are cut, as in the scripts of latent
    diffusion, those of DiT round.
    """

    load: Callable[[], nn.Module]
    to_bytes: Callable[[Tensor], Tensor] = truncated_to_uint8
    version: ClassVar[int] = 1

    def on(self, device: str) -> Callable[[Tensor], Tensor]:
        """Return the function from float32 latents (B, c, h, w) to uint8 images; its first call reads it."""
        network = cache(lambda: self.load().to(device).eval().requires_grad_(False))

        @torch.no_grad()
        def decode(latents: Tensor) -> Tensor:
            model: Any = network()
            factor = model.config.scaling_factor
            parts = [model.decode(part / factor).sample for part in latents.split(DECODED_AT_ONCE)]
            return torch.cat([self.to_bytes(part) for part in parts])

        return decode


def lsun_bedroom_ldm4(**given: Any) -> Task:
    """Return LSUN-Bedroom 256 with LDM-4, EMA weights; see `latent_task` for what can be given."""
    return latent_task("lsun_bedroom_ldm4", LDM_MODELS["lsun_bedroom_ldm4"], **given)


def lsun_church_ldm8(**given: Any) -> Task:
    """Return LSUN-Church 256 with LDM-8, EMA weights, eight heads everywhere; see `latent_task`."""
    return latent_task("lsun_church_ldm8", LDM_MODELS["lsun_church_ldm8"], **given)


def imagenet_ldm4(**given: Any) -> Task:
    """Return class-conditional ImageNet 256 with LDM-4 (cin256-v2), raw weights; see `latent_task`."""
    return latent_task("imagenet_ldm4", LDM_MODELS["imagenet_ldm4"], **given)


def latent_task(
    name: str,
    params: LdmParams,
    path: str | None = None,
    sample_shape: Sequence[int] = (3, 64, 64),
    calibration_conditions: str = CONDITIONS[0],
    evaluation_seed: int = 1234,
    expected: Mapping[str, Sequence[float]] | None = None,
    remedy: str = "set model.path",
) -> Task:
    """Return a task of a latent diffusion model, class-conditional where the params have classes.

    params: of the original checkpoint; a folder says its own. sample_shape: (c, h, w) of a latent.
    calibration_conditions: see `edadm.tasks.released`. expected: metric -> [value, deviation] of
    full precision at profile=paper.
    """
    weights = None if path is None else Path(path).expanduser()

    def at() -> Path:
        return task.location()

    @cache
    def classes() -> Conditions:
        embedding = load_class_embedding(at(), params)
        null = len(embedding) - 1
        return as_released(ClassConditions(null, null, embedding), calibration_conditions, evaluation_seed)

    task = Task(
        name=name,
        weights=weights,
        sample_shape=shape_of(sample_shape),
        load=partial(load_unet, params=params),
        expected_band=bands(expected),
        expected_profile="paper",
        conditions=classes if params.n_classes is not None else None,
        decoder=FirstStage(lambda: load_autoencoder(at(), params)),
        remedy=remedy,
    )
    return task


def shape_of(sample_shape: Sequence[int]) -> tuple[int, int, int]:
    """Return (C, H, W) of a sample. Raises EdadmError for anything else."""
    if len(sample_shape) != 3 or not all(isinstance(size, int) and size > 0 for size in sample_shape):
        raise EdadmError(f"model.sample_shape={list(sample_shape)}: give channels, height and width")
    channels, height, width = sample_shape
    return channels, height, width

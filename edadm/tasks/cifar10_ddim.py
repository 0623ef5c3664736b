"""Pixel-space CIFAR-10 with the DDIM network of 35.7 M parameters.

``model.path`` is the original EMA checkpoint file, a diffusers folder, or google/ddpm-cifar10-32 on the hub. The
paper's numbers are of the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from edadm.tasks import weights
from edadm.tasks.base import Task, bands, load_unet2d
from edadm.tasks.ddim_checkpoint import CIFAR10, load_checkpoint
from edadm.tasks.latent import shape_of

PARTS = {"path": ("config.json", "diffusion_pytorch_model.*")}
GIGABYTES = 0.2


def cifar10_ddim(
    path: str | None = None,
    sample_shape: Sequence[int] = (3, 32, 32),
    expected: Mapping[str, Sequence[float]] | None = None,
    remedy: str = "set model.path",
    config: Mapping[str, Any] = CIFAR10,
) -> Task:
    """Return the task. config: of the ``UNet2DModel`` that an original checkpoint file fills.

    expected: metric -> [value, largest deviation] of full precision at profile=paper.
    """
    return Task(
        name="cifar10_ddim",
        weights=weights.fetched(path, PARTS["path"], GIGABYTES),
        sample_shape=shape_of(sample_shape),
        load=lambda place: load_denoiser(place, config),
        expected_band=bands(expected),
        expected_profile="paper",
        remedy=remedy,
    )


def load_denoiser(place: Path, config: Mapping[str, Any]) -> nn.Module:
    """Read a diffusers folder, or an original checkpoint file into a ``UNet2DModel`` of this config."""
    from diffusers import UNet2DModel

    if place.is_dir():
        return load_unet2d(place)
    return load_checkpoint(UNet2DModel.from_config(dict(config)).eval(), place)

"""Class-conditional ImageNet 256 with DiT-XL/2.

``model.path`` is the folder of a diffusers pipeline (``transformer/`` and ``vae/``), its name on the hub
(facebook/DiT-XL-2-256), or the original checkpoint file, which needs ``model.first_stage`` beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from edadm.errors import EdadmError
from edadm.sampling.generate import to_uint8
from edadm.sampling.guidance import ClassConditions
from edadm.tasks import weights
from edadm.tasks.base import Task, bands
from edadm.tasks.dit_checkpoint import DIT_XL_2_256, DiTParams, load_dit
from edadm.tasks.latent import FirstStage, shape_of
from edadm.tasks.model_folder import DOWNSCALE_FREQ_SHIFT, load_model
from edadm.tasks.released import CONDITIONS, as_released

# what is read of a hub repository, for each entry that may name one
PARTS = {
    "path": tuple(
        f"{part}/{file}" for part in ("transformer", "vae") for file in ("config.json", "diffusion_pytorch_model.*")
    ),
    "first_stage": ("config.json", "diffusion_pytorch_model.safetensors"),
}
GIGABYTES = 3.4
GUIDED_CHANNELS = 3  # of four: golden README, ldm, 6.3


def imagenet_dit(
    path: str | None = None,
    first_stage: str | None = None,
    sample_shape: Sequence[int] = (4, 32, 32),
    classes: int = 1000,
    calibration_conditions: str = CONDITIONS[0],
    evaluation_seed: int = 1234,
    expected: Mapping[str, Sequence[float]] | None = None,
    remedy: str = "set model.path",
    params: DiTParams = DIT_XL_2_256,
) -> Task:
    """Return the task.

    first_stage: the folder of Stable Diffusion's autoencoder or its name on the hub, default ``vae/`` of ``path``.
    sample_shape: (4, h, w) of a latent. classes: their number, which is also the null label. params: of an original
    checkpoint file. The rest is as in `edadm.tasks.latent.latent_task`.
    """
    where = weights.fetched(path, PARTS["path"], GIGABYTES)
    apart = weights.fetched(first_stage, PARTS["first_stage"], 0.3, "model.first_stage")

    def autoencoder() -> Path:
        if apart is not None:
            return apart
        if not (task.location() / "vae").is_dir():
            raise EdadmError(
                f"{task.location()} has no autoencoder: set model.first_stage to a folder of Stable Diffusion's "
                "(stabilityai/sd-vae-ft-ema on the hub)"
            )
        return task.location() / "vae"

    task = Task(
        name="imagenet_dit",
        weights=where,
        sample_shape=shape_of(sample_shape),
        load=lambda place: _with_classes(load_transformer(place, params), classes, place),
        expected_band=bands(expected),
        expected_profile="paper",
        learned_variance=True,
        conditions=lambda: as_released(ClassConditions(classes, classes), calibration_conditions, evaluation_seed),
        guided_channels=GUIDED_CHANNELS,
        decoder=FirstStage(lambda: load_model(autoencoder()), to_uint8),
        others=() if apart is None else (apart,),
        hashed=("transformer", "vae"),
        remedy=remedy,
    )
    return task


def _with_classes(network: Any, classes: int, place: Path) -> nn.Module:
    """Return the network. Raises EdadmError unless it is a DiT of so many classes, whose null label follows them."""
    if type(network).__name__ != "DiTTransformer2DModel":
        raise EdadmError(f"{place} holds a {type(network).__name__}, not a DiTTransformer2DModel: give a DiT's weights")
    if network.config.num_embeds_ada_norm != classes:
        raise EdadmError(f"{place} holds a DiT of {network.config.num_embeds_ada_norm} classes, not of {classes}: set "
                         f"+task.classes={network.config.num_embeds_ada_norm}")  # fmt: skip
    return network


def load_transformer(place: Path, params: DiTParams) -> nn.Module:
    """Read the transformer of a pipeline's folder or of an original checkpoint, with the original's constants.

    Folders on the hub have neither the time frequencies nor the epsilon of the original (golden README, ldm, 4.8).
    """
    if place.is_file():
        return load_dit(place, params)
    folder = place / "transformer" if (place / "transformer").is_dir() else place
    return load_model(folder, norm_eps=1e-6, **{DOWNSCALE_FREQ_SHIFT: 0})

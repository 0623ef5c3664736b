"""The embedded latent tasks on CIFAR-10: LDM and DiT by class, and text to image, all on latents of 4 x 8 x 8.

Narrow models of the paper's structures, in the wheel, which run on two CPU cores. They share one autoencoder, so the
folder of a task holds none; ``model.path`` and ``model.first_stage`` put others in their place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edadm.tasks.base import Task, bands
from edadm.tasks.cifar10 import CLASSES
from edadm.tasks.cifar10_tiny import ASSETS
from edadm.tasks.compvis_unet import CIN256_V2, SD_V1, UNetParams
from edadm.tasks.dit import imagenet_dit
from edadm.tasks.dit_checkpoint import DiTParams
from edadm.tasks.first_stage import KL_F8
from edadm.tasks.latent import FirstStage, latent_task
from edadm.tasks.ldm_checkpoint import LdmParams
from edadm.tasks.model_folder import load_model
from edadm.tasks.stable_diffusion import text_task

AUTOENCODER = ASSETS / "cifar10_autoencoder" / "vae"
PROMPTS = ASSETS / "cifar10_prompts"
SAMPLE_SHAPE = (4, 8, 8)
AUTOENCODER_PARAMS = dataclasses.replace(
    KL_F8, ch=24, ch_mult=(1, 2, 2), num_res_blocks=1, resolution=32, norm_groups=8
)


def _narrow(unet: UNetParams) -> UNetParams:
    """Return two levels of an original network, with attention where it has it, at 64 channels."""
    return dataclasses.replace(
        unet,
        image_size=8,
        in_channels=4,
        out_channels=4,
        model_channels=64,
        attention_resolutions=tuple(factor for factor in unet.attention_resolutions if factor <= 2),
        channel_mult=(1, 1),
        num_res_blocks=1,
        context_dim=64,
        norm_groups=16,
    )


# Noise schedules and kinds of conditions are those of the models they stand for, heads about as wide as theirs.
LDM_PARAMS = LdmParams(
    _narrow(CIN256_V2), AUTOENCODER_PARAMS, 0.0015, 0.0195, ema=False, scale_factor=None, n_classes=len(CLASSES) + 1
)
_T2I = dataclasses.replace(_narrow(SD_V1), model_channels=48, num_heads=2)  # so that all latent networks fit into 12 MB
T2I_PARAMS = LdmParams(_T2I, AUTOENCODER_PARAMS, 0.00085, 0.012, ema=False, scale_factor=None)
DIT_PARAMS = DiTParams(
    input_size=8, patch_size=2, in_channels=4, hidden_size=144, depth=5, num_heads=3, num_classes=len(CLASSES)
)


def cifar10_ldm_tiny(
    path: str | None = None,
    first_stage: str | None = None,
    sample_shape: Sequence[int] = SAMPLE_SHAPE,
    expected: Mapping[str, Sequence[float]] | None = None,
    **given: Any,
) -> Task:
    """Return the class-conditional task with a class token.

    path: a folder with ``unet/`` and ``ldm.safetensors``, default the embedded one. first_stage: the folder of another
    autoencoder, default ``vae/`` of ``path`` if it has one, else the embedded one. expected: metric ->
    [value, deviation] of full precision with the embedded weights at profile=reference. given: see
    `edadm.tasks.latent.latent_task`.
    """
    folder = _folder("cifar10_ldm_tiny", path)
    task = latent_task("cifar10_ldm_tiny", LDM_PARAMS, str(folder), sample_shape, **given)
    task = dataclasses.replace(task, hashed=("unet", "vae", "ldm.safetensors"))
    return _scored(_decoded(task, folder, first_stage), expected, path, first_stage)


def cifar10_t2i_tiny(
    path: str | None = None,
    first_stage: str | None = None,
    prompts: str | None = None,
    calibration_prompts: str | None = None,
    sample_shape: Sequence[int] = SAMPLE_SHAPE,
    expected: Mapping[str, Sequence[float]] | None = None,
    **given: Any,
) -> Task:
    """Return the text-to-image task; needs the extra ``text``.

    path: a folder with ``unet/``, ``text_encoder/`` and ``tokenizer/``. prompts, calibration_prompts: see
    `edadm.tasks.text.split_prompts`, default the embedded files. The rest is as in `cifar10_ldm_tiny`, and given as in
    `edadm.tasks.stable_diffusion.text_task`.
    """
    folder, replaced = _folder("cifar10_t2i_tiny", path), (path, first_stage, prompts)
    if prompts is None:
        prompts = str(PROMPTS / "evaluation.txt")
        calibration_prompts = calibration_prompts or str(PROMPTS / "calibration.txt")
    name, files = "cifar10_t2i_tiny", (prompts, calibration_prompts)
    task = text_task(name, str(folder), *files, sample_shape, params=T2I_PARAMS, **given)
    return _scored(_decoded(task, folder, first_stage), expected, *replaced)


def cifar10_dit_tiny(
    path: str | None = None,
    first_stage: str | None = None,
    sample_shape: Sequence[int] = SAMPLE_SHAPE,
    expected: Mapping[str, Sequence[float]] | None = None,
    **given: Any,
) -> Task:
    """Return the class-conditional task of a DiT, which predicts noise and its variance.

    path: a folder with ``transformer/``. The rest is as in `cifar10_ldm_tiny`, and given as in
    `edadm.tasks.dit.imagenet_dit`.
    """
    folder = _folder("cifar10_dit_tiny", path)
    apart = _autoencoder(folder, first_stage)
    place = None if apart is None else str(apart)
    task = imagenet_dit(str(folder), place, sample_shape, len(CLASSES), params=DIT_PARAMS, **given)
    return _scored(dataclasses.replace(task, name="cifar10_dit_tiny"), expected, path, first_stage)


def _folder(name: str, path: str | None) -> Path:
    return ASSETS / name if path is None else _given(path)


def _given(path: str) -> Path:
    """Return the place of a path as an absolute one, which is never taken for a name on the hub."""
    return Path(path).expanduser().absolute()


def _autoencoder(folder: Path, first_stage: str | None) -> Path | None:
    """Return the folder of the autoencoder, None where it belongs to the model's."""
    if first_stage is not None:
        return _given(first_stage)
    return None if (folder / "vae").is_dir() else AUTOENCODER


def _decoded(task: Task, folder: Path, first_stage: str | None) -> Task:
    """Return the task with an autoencoder that is not in its folder, if it has none there."""
    apart = _autoencoder(folder, first_stage)
    if apart is None:
        return task
    return dataclasses.replace(task, decoder=FirstStage(lambda: load_model(apart)), others=(apart,))


def _scored(task: Task, expected: Mapping[str, Sequence[float]] | None, *replaced: str | None) -> Task:
    """Return the task with its expected scores, unless the user has put something in the place of an embedded part."""
    band = {} if any(replaced) else bands(expected)
    return dataclasses.replace(task, expected_band=band, expected_profile="reference")

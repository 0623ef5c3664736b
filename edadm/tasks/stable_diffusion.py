"""Stable Diffusion v1.4 with the prompts of MS-COCO or DrawBench.

``model.path`` is the folder of a diffusers pipeline, its name on the hub (CompVis/stable-diffusion-v1-4), or the
original checkpoint file (sd-v1-4.ckpt).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from edadm.errors import EdadmError
from edadm.prompts import read_captions
from edadm.sampling.guidance import Conditions
from edadm.sampling.interface import NOISE
from edadm.tasks import text, weights
from edadm.tasks.base import Task, bands
from edadm.tasks.latent import FirstStage, shape_of
from edadm.tasks.ldm_checkpoint import (
    LDM_MODELS,
    LdmParams,
    ldm_state,
    load_autoencoder,
    load_unet,
    text_encoder_state,
)
from edadm.tasks.released import CONDITIONS, RELEASED, as_released

# the files of a pipeline that are read, of which a hub name is downloaded
PARTS = {
    "path": (
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/*",
        "scheduler/*",
    ),
}
GIGABYTES = 4.3
CAPTIONS = "captions_val2014.json of MS-COCO (annotations of 2014, cocodataset.org)"
DRAWBENCH = "the prompts of DrawBench (the sheet that the Imagen project links, imagen.research.google)"


def coco_sd14(**given: Any) -> Task:
    """Return MS-COCO captions with Stable Diffusion v1.4; see `text_task` for what can be given."""
    return text_task("coco_sd14", **given)


def drawbench_sd14(**given: Any) -> Task:
    """Return DrawBench prompts with Stable Diffusion v1.4, all of them evaluated; see `text_task`."""
    return text_task("drawbench_sd14", **given, all_prompts=True)


def text_task(
    name: str,
    path: str | None = None,
    prompts: str | None = None,
    calibration_prompts: str | None = None,
    sample_shape: Sequence[int] = (4, 64, 64),
    calibration_conditions: str = CONDITIONS[0],
    evaluation_seed: int = 1234,
    expected: Mapping[str, Sequence[float]] | None = None,
    remedy: str = "set model.path",
    params: LdmParams = LDM_MODELS["sd14"],
    text_config: Mapping[str, Any] = text.CLIP_VIT_L_14,
    all_prompts: bool = False,
) -> Task:
    """Return a text-to-image task of Stable Diffusion v1.

    prompts, calibration_prompts: files, see `edadm.tasks.text.split_prompts`. sample_shape: (4, h, w) of a latent, an
    eighth of the image. calibration_conditions: see `edadm.tasks.released`. expected: metric -> [value, deviation] of
    full precision at profile=paper. params, text_config: of an original checkpoint file. all_prompts: whether none of
    the file may be kept for calibration.
    """
    where = weights.fetched(path, PARTS["path"], GIGABYTES)
    _require_noise_prediction(where, name)

    def at() -> Path:
        return task.location()

    def encoder() -> text.Encode:
        if at().is_dir():
            return text.encoder_of_folder(at())
        return text.encoder_of_state(text_encoder_state(ldm_state(at())), str(at()), text_config)

    @cache
    def of_prompts() -> Conditions:
        if prompts is None:
            raise EdadmError(
                f"dataset.prompts is not set, and task {name} has none of its own: set it to "
                f"{DRAWBENCH if all_prompts else CAPTIONS}, or to a text file with one prompt a line"
            )
        if all_prompts and calibration_prompts is None:
            split = _all_evaluated(name, prompts, calibration_conditions)
        else:
            split = text.split_prompts(prompts, calibration_prompts)
        own = text.TextConditions(*split, encoder)
        return as_released(own, calibration_conditions, evaluation_seed)

    task = Task(
        name=name,
        weights=where,
        sample_shape=shape_of(sample_shape),
        load=partial(load_unet, params=params),
        expected_band=bands(expected),
        expected_profile="paper",
        conditions=of_prompts,
        decoder=FirstStage(lambda: load_autoencoder(at(), params)),
        hashed=("unet", "vae", "text_encoder", "tokenizer"),
        remedy=remedy,
    )
    return task


def _all_evaluated(name: str, prompts: str, calibration_conditions: str) -> tuple[list[str], list[str]]:
    """Return all prompts of a file to evaluate, and none to calibrate. Raises EdadmError where some are needed."""
    if calibration_conditions != RELEASED:
        raise EdadmError(
            f"task {name} evaluates every prompt of dataset.prompts, which leaves none to calibrate with: set "
            "dataset.calibration_prompts to a file of others, such as captions_val2014.json of MS-COCO, or "
            f"task.calibration_conditions={RELEASED} to calibrate with the first evaluated ones as the released code"
        )
    return read_captions(prompts), []


def _require_noise_prediction(place: Path | None, name: str) -> None:
    """Raise EdadmError for a pipeline whose network predicts something else, which sampling would take for noise."""
    file = None if place is None else place / "scheduler" / "scheduler_config.json"
    if file is None or not file.is_file():  # of an original checkpoint, or of a folder that save_ldm wrote
        return
    try:
        predicts = json.loads(file.read_text(encoding="utf-8")).get("prediction_type", NOISE)
    except (ValueError, AttributeError) as error:
        raise EdadmError(f"{file} cannot be read as the configuration of a scheduler: fetch it again") from error
    if predicts != NOISE:
        raise EdadmError(
            f"{file} says prediction_type={predicts}, Stable Diffusion v1.4 of task {name} predicts {NOISE}: this is "
            f"another model, run it with task=pipeline model.path={place}"
        )

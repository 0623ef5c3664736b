"""A diffusers pipeline of the user's own, from a folder or the hub: docs/pipelines.md."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edadm import cost
from edadm.calibration.trajectories import submodule
from edadm.errors import EdadmError
from edadm.quant.network import Bits, QuantModel
from edadm.sampling.flow import FlowEuler
from edadm.sampling.from_scheduler import FLOW_SCHEDULER, sampler_of
from edadm.sampling.guidance import ClassConditions, Condition, Conditions
from edadm.sampling.interface import FLOW, NOISE, DiffusionSampler, unwrap
from edadm.tasks.base import PIPELINE, Own, Task, fitting, require_size
from edadm.tasks.latent import shape_of
from edadm.tasks.pipeline_calls import CALLS, FEATURES, Shape, adapt, constants, embeds_guidance
from edadm.tasks.pipeline_decoder import PipelineDecoder, pixels_per_position
from edadm.tasks.pipeline_parts import (
    INDEX,
    TEXT_ENCODERS,
    TOKENIZERS,
    Parts,
    fetched,
    load_part,
    load_texts,
    of_folder,
)
from edadm.tasks.pipeline_prompts import PipelinePrompts, encode
from edadm.tasks.released import CONDITIONS, as_released
from edadm.tasks.text import split_prompts

REMEDY = "set model.path to the folder of a diffusers pipeline, or to its name on the hub"
DIT = "DiTTransformer2DModel"  # says its number of classes; its null label is the one above them
UNCONDITIONAL = "UNet2DModel"
PARTS: Mapping[str, tuple[str, ...]] = {"path": ()}  # a repository of the hub is read whole
UNETS = (UNCONDITIONAL, "UNet2DConditionModel")


@dataclass(frozen=True)
class Given:
    """What the user says of a pipeline; None where its own files say.

    sample_shape: (C, H, W) of a sample, a latent where there is an autoencoder. classes: number of labels. null_label:
    the one that stands for none. guidance_scale: as ``sampler.guidance_scale``. prompts: makes those of the evaluated
    images and those that calibrate.
    """

    sample_shape: Sequence[int] | None = None
    classes: int | None = None
    null_label: int | None = None
    guidance_scale: float | None = None
    prompts: Callable[[], tuple[Sequence[str], Sequence[str]]] | None = None


def pipeline(
    path: str | None = None,
    sample_shape: Sequence[int] | None = None,
    classes: int | None = None,
    null_label: int | None = None,
    guidance_scale: float | None = None,
    prompts: str | None = None,
    calibration_prompts: str | None = None,
    calibration_conditions: str = CONDITIONS[0],
    evaluation_seed: int = 1234,
) -> Task:
    """Return the task of a pipeline in a folder or on the hub; see `Given` for what can be said of it.

    prompts, calibration_prompts: files, see `edadm.tasks.text.split_prompts`. calibration_conditions: see
    `edadm.tasks.released`. Raises EdadmError for a pipeline that cannot be covered, naming why.
    """
    if path is None:
        return Task(PIPELINE, None, (1, 1, 1), lambda place: nn.Identity(), remedy=REMEDY)
    folder = fetched(path)
    parts = of_folder(folder)
    QuantModel.wrap(_empty(parts), Bits(4, 8))  # its errors, before anything long
    split = None if prompts is None else partial(split_prompts, prompts, calibration_prompts)
    given = Given(sample_shape, classes, null_label, guidance_scale, split)
    task = task_of(parts, given, lambda: load_texts(folder, parts))
    assert task.own is not None
    adapted, conditions, decoder = task.own.adapt, task.conditions, parts.decoder
    hashed = {parts.denoiser, *TEXT_ENCODERS, *TOKENIZERS} | ({decoder[0]} if decoder else set())
    return replace(
        task,
        weights=folder,
        load=lambda place: adapted(load_part(place, parts.denoiser, parts.denoiser_class)),
        conditions=conditions and (lambda: as_released(conditions(), calibration_conditions, evaluation_seed)),
        decoder=decoder and PipelineDecoder(decoder[1], partial(load_part, folder, decoder[0])),
        hashed=_hashed(folder, parts.components & hashed),
    )


def _hashed(folder: Path, components: Collection[str]) -> tuple[str, ...]:
    """Return the parts of a folder that belong to the checkpoint: all of it where they have no folders of their own."""
    if not all((folder / name).is_dir() for name in components):
        return ()
    return (INDEX, *sorted(components))  # the index says the class, and how no prompt is encoded


def task_of(parts: Parts, given: Given, texts: Callable[[], Any]) -> Task:
    """Return the task of a pipeline without its weights.

    texts: makes the pipeline that encodes prompts. Raises EdadmError for a pipeline that cannot be covered.
    """
    call, config = CALLS[parts.denoiser_class], parts.config
    shape = call.shape(config, parts.place) if given.sample_shape is None else shape_of(given.sample_shape)
    if shape[0] != call.channels(config):
        raise EdadmError(
            f"model.sample_shape={list(shape)}: the denoiser of {parts.place} takes {call.channels(config)} channels"
        )
    return Task(
        name=PIPELINE,
        weights=None,
        sample_shape=shape,
        load=lambda place: nn.Identity(),
        prediction_type=_prediction_type(parts),
        learned_variance=config.get("out_channels") == 2 * config["in_channels"],
        conditions=_conditions(parts, given, shape, texts),
        guided_channels=shape[0] if parts.denoiser_class == DIT else None,
        remedy=REMEDY,
        own=_own(parts, given, shape),
    )


def _prediction_type(parts: Parts) -> str:
    is_flow = parts.scheduler["_class_name"] == FLOW_SCHEDULER
    return FLOW if is_flow else str(parts.scheduler.get("prediction_type", NOISE))


def _own(parts: Parts, given: Given, shape: Shape) -> Own:
    call, name = CALLS[parts.denoiser_class], parts.denoiser_class

    def sampler(steps: int, eta: float) -> DiffusionSampler:
        patch = 2 if call.packed else parts.config.get("patch_size", 1)
        tokens = (shape[1] // patch) * (shape[2] // patch)
        try:
            kind = parts.pipeline.__name__
            return sampler_of(parts.scheduler, steps, eta, pipeline=kind, denoiser=name, tokens=tokens)
        except EdadmError as error:
            raise EdadmError(f"{parts.place}: {error}; and sampler@calibration_sampler=... likewise") from error

    return Own(
        denoiser_class=name,
        sampler=sampler,
        schedule=_schedule(parts, sampler),
        guidance_scale=_guidance_scale(parts, given),
        embeds_guidance=embeds_guidance(name, parts.config),
        takes_prompts=parts.has_texts,
        features=dict(zip(FEATURES, call.features(parts.config), strict=True)),
        adapt=partial(adapt, class_name=name, shape=shape),
        size=cache(lambda: _size(parts, given, shape)),
        feature_numbers=cache(lambda module: _feature_numbers(parts, given, shape, module)),
    )


def _schedule(parts: Parts, sampler: Callable[[int, float], DiffusionSampler]) -> Mapping[str, Any]:
    """Return the numbers of the training that samplers of ours take, none where the scheduler has none for them."""
    config = parts.scheduler
    if config["_class_name"] == FLOW_SCHEDULER:
        try:
            own = sampler(2, 0.0)
        except EdadmError:
            return {}
        assert isinstance(own, FlowEuler)
        return {"shift": own.shift, "last_sigma": own.last_sigma, "time_scale": own.time_scale}
    if config.get("trained_betas") is not None or config.get("rescale_betas_zero_snr"):
        return {}
    numbers = {name: config[name] for name in ("beta_schedule", "beta_start", "beta_end") if name in config}
    return numbers | {"train_steps": config.get("num_train_timesteps", 1000)}


def _guidance_scale(parts: Parts, given: Given) -> float:
    """Return the scale, by default that of the pipeline's call; as a second row, 1 and less mean no guidance."""
    scale = parts.default("guidance_scale", 1.0) if given.guidance_scale is None else given.guidance_scale
    return float(scale) if embeds_guidance(parts.denoiser_class, parts.config) else max(1.0, float(scale))


def _empty(parts: Parts) -> nn.Module:
    """Return the denoiser without storage."""
    import diffusers

    with torch.device("meta"):
        model: Any = getattr(diffusers, parts.denoiser_class).from_config(dict(parts.config))
    return model.eval()


def _size(parts: Parts, given: Given, shape: Shape) -> tuple[int, int]:
    """Return parameters of the denoiser and multiply-accumulates of one row.

    Raises EdadmError when it does not take samples of the shape.
    """
    model, x, named = _without_storage(parts, given, shape)
    with torch.device("meta"), fitting(f"the {parts.denoiser} of {parts.place}", PIPELINE, shape):
        layers = cost.measure(model, x, **named)
    return sum(tensor.numel() for tensor in model.parameters()), sum(layer.macs for layer in layers)


def _feature_numbers(parts: Parts, given: Given, shape: Shape, module: str) -> int:
    """Return how many numbers a row of a module's output has. Raises EdadmError for an unknown module."""
    model, x, named = _without_storage(parts, given, shape)
    with torch.device("meta"):
        return cost.output_numbers(submodule(model, module), lambda: model(x, **named))


def _without_storage(parts: Parts, given: Given, shape: Shape) -> tuple[nn.Module, torch.Tensor, dict[str, Any]]:
    """Return the denoiser, one row of its sample and of all else that it is called with, on the meta device."""
    model = adapt(_empty(parts), parts.denoiser_class, shape)
    shared = _shared(parts, given, shape)
    model.register_forward_hook(lambda _, given, output: require_size(unwrap(output), shape))
    with torch.device("meta"):
        named = {key: torch.zeros(1, *row) for key, row in CALLS[parts.denoiser_class].tokens(parts.config).items()}
        named |= {key: torch.zeros(row.shape) for key, row in shared.items()}
        if _classes(parts, given) is not None:
            named["class_labels"] = torch.zeros(1, dtype=torch.int64)
        return model, torch.zeros(1, *shape), named | {"timestep": torch.zeros(1, dtype=torch.int64)}


def _conditions(parts: Parts, given: Given, shape: Shape, texts: Callable[[], Any]) -> Callable[[], Conditions] | None:
    """Return what makes the conditions of a pipeline's images, None for an unconditional denoiser."""
    labels = _classes(parts, given)
    if parts.has_texts:
        return cache(lambda: _of_prompts(parts, given, shape, texts))
    if given.prompts is not None:
        raise EdadmError(f"{parts.place} has no text encoder: it takes no prompts")
    if labels is not None:
        return lambda: ClassConditions(*labels)
    if parts.denoiser_class != UNCONDITIONAL:
        raise EdadmError(f"{parts.place} has no text encoder for its {parts.denoiser_class}: give a whole pipeline")
    return None


def _classes(parts: Parts, given: Given) -> tuple[int, int | None] | None:
    """Return the number of labels and the null label of a class-conditional denoiser, None for another.

    Raises EdadmError for labels that its table does not have.
    """
    rows = _rows_of_labels(parts)
    if rows is None:
        if not (given.classes is None and given.null_label is None):
            raise EdadmError(f"{parts.place} takes no class labels: leave model.classes and model.null_label out")
        return None
    labels = rows - 1 if parts.denoiser_class == DIT else rows
    null = labels if parts.denoiser_class == DIT and given.null_label is None else given.null_label
    classes = labels if given.classes is None else given.classes
    _require_within("classes", classes, 1, labels, parts)
    if null is not None:
        _require_within("null_label", null, 0, rows - 1, parts)
    return classes, null


def _rows_of_labels(parts: Parts) -> int | None:
    """Return how many labels a denoiser embeds, None for one without. Raises EdadmError for other such conditions."""
    config = parts.config
    if parts.denoiser_class == DIT:
        return int(config["num_embeds_ada_norm"]) + 1
    if parts.denoiser_class not in UNETS:
        return None
    kind, rows = config.get("class_embed_type"), config.get("num_class_embeds")
    if kind in ("timestep", "identity"):
        raise EdadmError(f"{parts.place}: conditions of class_embed_type={kind} are no labels")
    if parts.has_texts and not (kind is None and rows is None):
        raise EdadmError(
            f"{parts.place}: its denoiser takes class labels besides texts (class_embed_type={kind}, "
            f"num_class_embeds={rows}); such pipelines cannot be calibrated here"
        )
    return None if rows is None or parts.denoiser_class != UNCONDITIONAL else int(rows)


def _require_within(name: str, value: int, least: int, most: int, parts: Parts) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise EdadmError(f"model.{name}={value}: the denoiser of {parts.place} embeds labels, choose {least} to {most}")


def _of_prompts(parts: Parts, given: Given, shape: Shape, texts: Callable[[], Any]) -> Conditions:
    if given.prompts is None:
        raise EdadmError(
            f"{parts.place} makes images of texts and needs some: set dataset.prompts to a text file with one prompt a "
            "line, or pass prompts=[...] to edadm.quantize"
        )
    evaluated, calibration = given.prompts()
    encoder = cache(lambda: partial(encode, texts(), parts))
    return PipelinePrompts(evaluated, calibration, encoder, _shared(parts, given, shape))


def _shared(parts: Parts, given: Given, shape: Shape) -> Condition:
    """Return the conditions that are equal for all images, one row each."""
    factor = 1 if parts.decoder is None else pixels_per_position(parts.decoder[1])
    pixels = shape[1] * factor, shape[2] * factor
    return constants(parts.denoiser_class, parts.config, pixels, _guidance_scale(parts, given))

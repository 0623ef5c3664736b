"""Quantize a diffusers pipeline in memory, and load a saved one: docs/pipelines.md.

The stages are those of ``run.py``, with the same parts, defaults and cache; what differs is that the denoiser comes
from the pipeline and goes back into one.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edadm.errors import EdadmError
from edadm.quant import io, pretrained
from edadm.quant.network import QuantModel
from edadm.quant.quantizer import FLOAT_BITS

if TYPE_CHECKING:
    from edadm.keys import Run

logger = logging.getLogger(__name__)

MOST_STEPS = 100  # of the calibration trajectories, unless more are asked for
BATCH = 16  # rows of a minibatch, unless there are fewer or another number is asked for
SHORT = {
    "rows": "profile.rows", "iterations": "profile.iterations", "batch": "profile.batch",
    "steps": "calibration_sampler.steps", "eta": "calibration_sampler.eta", "guidance_scale": "sampler.guidance_scale",
}  # fmt: skip
NO_PART_OF_IT = (
    "task", "model", "dataset", "metrics", "load", "images", "n_images", "sites", "check", "results", "reference",
    "logger", "launcher", "diagnostics", "experiments", "evaluation_seed",
)  # fmt: skip


def quantize(
    pipe: Any,
    method: str = "edadm",
    bits: str = "w4a8",
    *,
    prompts: Sequence[str] | str | Path | None = None,
    sample_shape: Sequence[int] | None = None,
    classes: int | None = None,
    null_label: int | None = None,
    **choices: Any,
) -> Any:
    """Return a pipeline like ``pipe``, whose denoiser is quantized; all other components are shared with ``pipe``.

    method, bits: names of ``run.py``. prompts: those that calibrate a text-to-image pipeline, a list or a file with one
    a line. sample_shape: (C, H, W) of the samples that calibrate, those of a latent where there is an autoencoder, by
    default of the denoiser's configuration. classes, null_label: of a class-conditional UNet.
    choices: rows, iterations, batch, steps, eta, guidance_scale, and any word of the command line that is not in
    NO_PART_OF_IT, its dots as they are: ``seed=1``, ``calibration="random"``, ``**{"recipe.lr_weight": 0.1}``.
    Calibration samples with the pipeline's own scheduler, as many steps (at most 100) and the guidance that a call of
    the pipeline takes.
    Stages are kept in the cache; a call with the same arguments finds them, a killed one goes on.
    Raises EdadmError before anything long for a pipeline that cannot be covered, for impossible choices, and where
    memory is short; time and memory are estimated and logged first.
    """
    from edadm.experiment import set_machine
    from edadm.keys import Run
    from edadm.store import Store
    from edadm.tasks.pipeline import Given
    from edadm.tasks.pipeline_live import live
    from edadm.tasks.pipeline_parts import of_pipeline

    parts = of_pipeline(pipe)
    steps = min(MOST_STEPS, parts.default("num_inference_steps", MOST_STEPS))
    device = str(getattr(pipe, parts.denoiser).device)
    settings = _settings(_words(method, bits, {"steps": steps, "device": device, **choices}))
    split = None if prompts is None else _of_calibration(prompts)
    task = live(pipe, Given(sample_shape, classes, null_label, settings["sampler.guidance_scale"], split))
    assert task.own is not None
    task.own.size()  # tries the shape of a sample, without storage
    if min(settings["bits.weight"], settings["bits.act"]) >= FLOAT_BITS:
        raise EdadmError(f"bits={bits} leaves everything in floating point: there is nothing to quantize")
    logger.info("%s: quantizing the %s of a %s", settings.label, task.component, type(pipe).__name__)
    with _machine_kept():
        network = _quantized(Run(settings, task, Store(), *set_machine(settings)), task.module)
    facts = {"method": settings["method"], "variant": dict(settings.variant), "seed": settings["seed"]}
    return _with(pipe, task.component, pretrained.as_denoiser(network.to(device), **facts))


def _quantized(run: Run, module: nn.Module) -> QuantModel:
    """Return the quantized denoiser of a run, once it is known that nothing about it is impossible.

    Says first what it will cost, and raises EdadmError where that cannot fit into memory.
    """
    from edadm import stages
    from edadm.estimate import announcement_of_quantization
    from edadm.experiment import calibrate

    if run.calibration_file:
        stages.stored_rows(run)
    QuantModel.wrap(_without_storage(module), run.bits, run.plan)
    logger.info("%s", announcement_of_quantization(run))
    return io.load(stages.quantized(run, calibrate(run)).folder)


@contextmanager
def _machine_kept() -> Iterator[None]:
    """Give torch back the threads and the switches of GPUs that the caller's process had."""
    threads, cudnn = torch.get_num_threads(), torch.backends.cudnn
    switches = torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic = switches


def load_pipeline(folder: str | Path, quantized: str | Path | None = None, **components: Any) -> Any:
    """Return the pipeline of a folder that ``save_pretrained`` of a quantized pipeline wrote, equal to the bit.

    quantized: the folder of a quantized denoiser, such as a run keeps in its cache, to put into the full-precision
    pipeline of ``folder``. components: passed on to diffusers' ``from_pretrained``.
    Raises EdadmError when there is no quantized denoiser, or one of another class than the pipeline's.
    """
    import diffusers

    from edadm.tasks.pipeline_parts import INDEX, class_of, of_folder

    folder = Path(folder).expanduser()
    if not (folder / INDEX).is_file():
        raise EdadmError(f"{folder} is no folder of a pipeline: it has no {INDEX}")
    if "custom_pipeline" not in components:
        class_of(folder)
    name = pretrained.quantized_component(folder)
    if quantized is not None:
        parts, place = of_folder(folder), Path(quantized).expanduser()
        name, found = parts.denoiser, io.read_description(place)["model_class"]
        if found != parts.denoiser_class:
            raise EdadmError(f"{place} holds a {found}, the {name} of {folder} is a {parts.denoiser_class}")
    elif name is not None:
        place = folder / name
    else:
        raise EdadmError(f"nothing in {folder} is quantized: give quantized=FOLDER of a denoiser, or use diffusers")
    description = io.read_description(place)
    facts = {key: description[key] for key in ("method", "variant", "seed") if key in description}
    denoiser = pretrained.as_denoiser(io.load(place), **facts)
    return diffusers.DiffusionPipeline.from_pretrained(folder, **{name: denoiser}, **components)


def register() -> None:
    """Make ``from_pretrained`` of diffusers load quantized denoisers and pipelines; it needs accelerate for that."""
    pretrained.register()


def _words(method: str, bits: str, choices: Mapping[str, Any]) -> list[str]:
    """Return the words of the command line that say what the arguments of `quantize` do."""
    named = {SHORT.get(name, name): value for name, value in choices.items()}
    for name in named:
        if re.split(r"[.@]", name)[0] in NO_PART_OF_IT:
            raise EdadmError(f"{name} is no choice of edadm.quantize: run.py has it (task=pipeline model.path=FOLDER)")
    if "profile.rows" in named and "profile.batch" not in named and isinstance(named["profile.rows"], int):
        named["profile.batch"] = max(1, min(BATCH, named["profile.rows"]))
    if "profile.threads" not in named and "threads" not in named:
        named["threads"] = torch.get_num_threads()
    fixed = {"task": "pipeline", "method": method, "bits": bits}
    return [f"{name}={_value(value)}" for name, value in {**fixed, **named}.items()]


def _value(value: Any) -> str:
    """Return a value in the grammar of Hydra's command line."""
    if not isinstance(value, str | Path):
        return json.dumps(value)
    text = str(value)
    if re.fullmatch(r"[\w./-]+", text):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _settings(words: Sequence[str]) -> Any:
    """Return the settings of some words. Raises EdadmError for names and values that there are not."""
    from hydra.errors import HydraException, MissingConfigException

    from edadm import config

    if not config.CONF.is_dir():
        raise EdadmError(
            f"{config.CONF} is missing: methods and bit widths are files of the checkout, which the wheel does not "
            "hold; install the checkout with pip install -e ."
        )
    try:
        return config.settings(config.compose(words), words)
    except MissingConfigException as error:
        chosen = str(error.missing_cfg_file).replace("/", "=")
        raise EdadmError(f"{chosen}: choose {', '.join(error.options or ())}") from error
    except HydraException as error:
        raise EdadmError(" ".join(str(error).split())) from error


def _of_calibration(prompts: Sequence[str] | str | Path) -> Any:
    """Return what makes the prompts of a pipeline: none to evaluate. Raises EdadmError for no list of texts."""
    from edadm.prompts import check_prompts, read_captions

    if isinstance(prompts, str | Path):
        texts = read_captions(prompts)
    else:
        texts = list(prompts)
        check_prompts(texts, max(1, len(texts)))
    return lambda: ((), texts)


def _without_storage(module: nn.Module) -> nn.Module:
    """Return a copy of a module on the meta device, with everything else as it is."""
    memo: dict[int, Any] = {id(parameter): _empty(parameter) for parameter in module.parameters()}
    memo |= {id(buffer): buffer.to("meta") for buffer in module.buffers()}
    return copy.deepcopy(module, memo)


def _empty(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)


def _with(pipe: Any, name: str, denoiser: nn.Module) -> Any:
    """Return a pipeline with another denoiser and else the same components."""
    changed = copy.copy(pipe)
    changed.register_modules(**{name: denoiser})
    return changed

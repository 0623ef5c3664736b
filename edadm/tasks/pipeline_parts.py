"""What a diffusers pipeline is made of, from its folder or from the pipeline itself, and reading its parts."""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from edadm.errors import EdadmError
from edadm.quant.io import QUANTIZATION
from edadm.tasks import text, weights
from edadm.tasks.model_folder import ATTENTION_HEADS, DOWNSCALE_FREQ_SHIFT, load_model
from edadm.tasks.pipeline_calls import CALLS

logger = logging.getLogger(__name__)

INDEX = weights.INDEX
DECODERS = ("vae", "vqvae")
_DENOISERS = ("unet", "transformer")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
_BESIDE = ("safety_checker", "feature_extractor", "image_encoder")  # no part of what makes an image of a text
_CONFIGS = dict.fromkeys((*_DENOISERS, *DECODERS), "config.json") | {"scheduler": "scheduler_config.json"}
# classes of early folders, by their norm_type
_EARLY = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Parts:
    """A diffusers pipeline without its weights.

    place: where it is, for messages. pipeline: its class. denoiser: name of the component, of class denoiser_class.
    decoder: name and configuration of the autoencoder, if there is one.
    """

    place: str
    pipeline: Any
    denoiser: str
    denoiser_class: str
    config: Config
    scheduler: Config
    decoder: tuple[str, Config] | None
    components: frozenset[str]

    @property
    def has_texts(self) -> bool:
        """Say whether there is a text encoder."""
        return not self.components.isdisjoint(TEXT_ENCODERS)

    def default(self, argument: str, otherwise: Any) -> Any:
        """Return what a call of the pipeline takes for an argument that is not given."""
        taken = inspect.signature(self.pipeline.__call__).parameters
        found = taken[argument].default if argument in taken else inspect.Parameter.empty
        return otherwise if found is inspect.Parameter.empty else found


def fetched(path: str) -> Path:
    """Return the folder of a pipeline, downloaded if ``path`` is a hub name that is not here yet.

    Raises EdadmError when it is not possible, with the ways around it.
    """
    found = weights.local(path)
    if found is not None:
        return found
    from diffusers import DiffusionPipeline

    logger.info("model.path=%s: downloading the pipeline from the hub", path)
    try:
        folder = Path(DiffusionPipeline.download(path))
    except Exception as error:  # the client raises those of its transport, whose types depend on its version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EdadmError(
            f"model.path={path} is no folder here, and it could not be fetched from the hub ({reason}). Give the path "
            f"of a local copy, or fetch it where there is a network: hf download {path}"
        ) from error
    return weights.whole(path, folder)


def of_folder(folder: Path) -> Parts:
    """Return the parts of a folder that ``save_pretrained`` of a pipeline wrote; no weights are read.

    Raises EdadmError for a folder of something else, and for a pipeline that cannot be covered, naming why.
    """
    if not folder.is_dir():
        raise EdadmError(f"model.path={folder} is no folder: give that of a diffusers pipeline, or a name on the hub")
    pipeline = class_of(folder)
    index = _json(folder / INDEX, "the folder of a diffusers pipeline (DiffusionPipeline.save_pretrained)")
    listed = {name: value for name, value in index.items() if isinstance(value, list) and len(value) == 2 and value[1]}
    configs = {
        name: _json(_of(folder, name) / _CONFIGS[name], f"the {name} that {INDEX} names")
        for name in listed
        if name in _CONFIGS
    }
    return _parts(str(folder), pipeline, frozenset(listed), configs)


def class_of(folder: Path) -> Any:
    """Return the class of a folder's pipeline. Raises EdadmError for one that diffusers does not have."""
    import diffusers

    index = _json(folder / INDEX, "the folder of a diffusers pipeline (DiffusionPipeline.save_pretrained)")
    name = index.get("_class_name")
    found = getattr(diffusers, str(name), None)
    if found is None:
        raise EdadmError(
            f"{folder / INDEX} says _class_name={name}, which this version of diffusers does not have, so its call and "
            "its guidance are not known: write the class of diffusers there that it derives from, or load it with your "
            "own class and pass it to edadm.quantize"
        )
    return found


def of_pipeline(pipe: Any) -> Parts:
    """Return the parts of a pipeline in memory. Raises EdadmError when it cannot be covered, naming why."""
    import diffusers

    kind: Any = diffusers.DiffusionPipeline
    if not isinstance(pipe, kind):
        raise EdadmError(f"a {type(pipe).__name__} is no diffusers pipeline: give what DiffusionPipeline has loaded")
    there = {name: part for name, part in pipe.components.items() if part is not None}
    configs = {
        name: {**part.config, "_class_name": type(part).__name__}
        for name, part in there.items()
        if name in _CONFIGS and hasattr(part, "config")
    }
    return _parts(f"the {type(pipe).__name__}", type(pipe), frozenset(there), configs)


def _parts(place: str, pipeline: Any, components: frozenset[str], configs: Mapping[str, Config]) -> Parts:
    known = {*_CONFIGS, *TEXT_ENCODERS, *TOKENIZERS, *_BESIDE}
    if unknown := sorted(components - known):
        raise EdadmError(
            f"{place} has {', '.join(unknown)} besides what makes an image of noise, a class or a text: pipelines with "
            "other inputs cannot be calibrated here"
        )
    denoisers = [name for name in _DENOISERS if name in configs]
    if len(denoisers) != 1 or "scheduler" not in configs:
        found = ", ".join(sorted(components)) or "nothing"
        raise EdadmError(f"{place} has {found}: expected one unet or transformer of diffusers, and a scheduler")
    config = configs[denoisers[0]]
    class_name = str(config.get("_class_name"))
    if class_name == "Transformer2DModel":
        class_name = _EARLY.get(str(config.get("norm_type")), class_name)
    if class_name not in CALLS:
        raise EdadmError(f"{place}: its denoiser is a {class_name}, known are {', '.join(CALLS)}")
    config = {**_defaults(class_name), **config}
    decoder = next(((name, _complete(configs[name])) for name in DECODERS if name in configs), None)
    parts = Parts(place, pipeline, denoisers[0], class_name, config, configs["scheduler"], decoder, components)
    _check_channels(parts)
    return parts


def _complete(config: Config) -> Config:
    """Return a configuration with what its class takes where it does not say, such as an autoencoder's factor."""
    return {**_defaults(str(config.get("_class_name"))), **config}


def _defaults(class_name: str) -> dict[str, Any]:
    """Return what a class takes where a configuration does not say, nothing for one that diffusers does not have."""
    import diffusers

    taken = inspect.signature(getattr(diffusers, class_name, object).__init__).parameters.values()
    return {argument.name: argument.default for argument in taken if argument.default is not argument.empty}


def _check_channels(parts: Parts) -> None:
    """Raise EdadmError for a denoiser that is given more than a noisy sample in its channels."""
    takes = CALLS[parts.denoiser_class].channels(parts.config)
    latent = None if parts.decoder is None else parts.decoder[1].get("latent_channels")
    if latent is not None and latent != takes:
        raise EdadmError(
            f"{parts.place}: its denoiser takes {takes} channels, its latents have {latent}; pipelines that are given "
            "an image or a mask besides cannot be calibrated here"
        )


def load_part(folder: Path, name: str, class_name: str | None = None) -> nn.Module:
    """Read a diffusers module of a pipeline in float32 and evaluation mode.

    Raises EdadmError when a file is missing or broken, naming tensors that are missing, unexpected or of another shape,
    and for a denoiser that is quantized already.
    """
    import diffusers

    place = _of(folder, name)
    config = _json(place / "config.json", f"the {name} of a pipeline")
    if config.get(QUANTIZATION):
        raise EdadmError(
            f"{place} is quantized already ({config[QUANTIZATION].get('quant_method')}): give the pipeline as it was "
            "before; load= scores a network that was quantized here"
        )
    if config.get(ATTENTION_HEADS) is not None or config.get(DOWNSCALE_FREQ_SHIFT) is not None:
        return load_model(place)
    kind = getattr(diffusers, class_name or str(config.get("_class_name")), None)
    if kind is None:
        raise EdadmError(f"{place} holds a {config.get('_class_name')}, which this version of diffusers does not have")
    weights.refuse_variants(place)
    few = importlib.util.find_spec("accelerate") is not None
    try:
        model, found = kind.from_pretrained(
            place, output_loading_info=True, local_files_only=True, low_cpu_mem_usage=few
        )
    except Exception as error:  # of torch, safetensors, huggingface_hub or diffusers itself
        raise EdadmError(f"{place} cannot be read: {str(error).splitlines()[0]}") from error
    wrong = [
        f"{what.removesuffix('_keys')} {', '.join(map(str, found[what][:4]))}"
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if found[what]
    ]
    if wrong:
        raise EdadmError(f"{place} does not fit {kind.__name__}: {'; '.join(wrong)}")
    return model.float().eval()


def load_texts(folder: Path, parts: Parts) -> Any:
    """Return the pipeline of a folder with its tokenizers and text encoders alone.

    Raises EdadmError when they cannot be read, and naming the extra where transformers is not installed.
    """
    if importlib.util.find_spec("transformers") is None:
        raise EdadmError("text-to-image pipelines need the package transformers: pip install 'edadm[text]'")
    for name in parts.components.intersection(TOKENIZERS):
        text.require_vocabulary(folder / name)
    classes = _json(folder / INDEX, "the folder of a diffusers pipeline")
    encoders = {
        name: text.load_encoder(folder / name, str(classes[name][1]))
        for name in sorted(parts.components.intersection(TEXT_ENCODERS))
    }
    wanted = {*TEXT_ENCODERS, *TOKENIZERS, "scheduler"}
    without = dict.fromkeys(parts.components - wanted)
    try:
        pipe = parts.pipeline.from_pretrained(folder, **without, **encoders, local_files_only=True)
    except Exception as error:
        raise EdadmError(f"the text encoders in {folder} cannot be read: {str(error).splitlines()[0]}") from error
    for name in parts.components.intersection(TEXT_ENCODERS):
        getattr(pipe, name).eval().requires_grad_(False)
    return pipe


def _of(folder: Path, name: str) -> Path:
    """Return the folder of a part; a pipeline of one network may have its files beside model_index.json."""
    return folder / name if (folder / name).is_dir() else folder


def _json(file: Path, what: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EdadmError(f"{file} is missing: it would be {what}") from error
    except (OSError, ValueError) as error:
        raise EdadmError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise EdadmError(f"{file} holds no object: it would be {what}")
    return found

"""Diffusers modules whose config cannot say everything: built, saved and read with what is missing.

Two original networks differ from every configuration of their diffusers class. The difference is kept as a field of
our own in ``config.json``, which stock diffusers reports as ignored and `load_model` applies.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edadm.errors import EdadmError
from edadm.tasks.checkpoint_file import read_file, state_dict
from edadm.tasks.conversion import Source, convert, fill
from edadm.tasks.weights import other_weights

CLASSES = ("UNet2DModel", "UNet2DConditionModel", "DiTTransformer2DModel", "VQModel", "AutoencoderKL")
ATTENTION_HEADS = "edadm_attention_heads"
DOWNSCALE_FREQ_SHIFT = "edadm_downscale_freq_shift"
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# names of attention layers in folders that early versions of diffusers saved, as those of Stable Diffusion v1
_EARLY_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_EARLY_DIT = ("Transformer2DModel", "ada_norm_zero")  # class and norm_type of early folders of a DiT


def empty_model(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """Return a diffusers module on the meta device, its parameters without storage.

    config: of diffusers, with ``ATTENTION_HEADS`` or ``DOWNSCALE_FREQ_SHIFT`` where the network needs them.
    Raises EdadmError for a class that is not in CLASSES or a config it does not take.
    """
    import diffusers
    from diffusers.models.embeddings import PatchEmbed

    if class_name not in CLASSES:
        raise EdadmError(f"cannot build a {class_name}: choose one of {', '.join(CLASSES)}")
    own = {field: config[field] for field in _PATCHES if config.get(field) is not None}
    stock = {field: value for field, value in config.items() if field not in _PATCHES}
    try:
        with torch.device("meta"):
            model: Any = getattr(diffusers, class_name).from_config(stock)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise EdadmError(f"{class_name} does not take this config: {error}") from error
    if class_name == "DiTTransformer2DModel":  # its table of positions is computed, not saved
        size, patch = model.config.sample_size, model.config.patch_size
        model.pos_embed = PatchEmbed(size, size, patch, model.config.in_channels, model.inner_dim)
    for field, value in own.items():
        _PATCHES[field](model, value)
    model.register_to_config(**own)
    return model


def load_model(folder: str | Path, **config: Any) -> nn.Module:
    """Read a folder of ``save_pretrained`` in float32 and evaluation mode, our config fields applied.

    config: fields that replace those of the folder. Weights are safetensors, else a .bin that holds tensors only; what
    early versions of diffusers named otherwise is read, too.
    Raises EdadmError when a file is missing or broken, and naming missing, extra and mis-shaped keys.
    """
    folder = Path(folder)
    config_file = folder / "config.json"
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), folder / _WEIGHTS[0])
    for file in (config_file, weights):
        if not file.is_file():
            inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
            hint = f"; {folder} holds {', '.join(inner)}, each in a folder of its own" if inner else ""
            hint += other_weights(folder) if file is weights else ""
            raise EdadmError(f"{file} is missing: give a folder saved by save_pretrained with safetensors{hint}")
    try:
        saved = json.loads(config_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise EdadmError(f"{config_file} is no JSON: {error}") from error
    class_name = str(saved.get("_class_name"))
    if (class_name, saved.get("norm_type")) == _EARLY_DIT:
        class_name = "DiTTransformer2DModel"
    model = empty_model(class_name, saved | config)
    state = state_dict(read_file(weights), str(weights))
    return fill(model, convert(state, lambda name: Source(_name_in(state, name)), model, str(weights)), str(weights))


def require_denoiser(
    network: nn.Module, source: str, sample_shape: Sequence[int], conditional: bool, learned_variance: bool
) -> None:
    """Raise EdadmError when a diffusers denoiser is not one for samples of this shape and kind.

    source: the file or folder, for messages. sample_shape: (C, H, W). conditional: whether there are conditions to call
    it with.
    """
    config, name = getattr(network, "config", {}), type(network).__name__
    channels, shape = sample_shape[0], list(sample_shape)
    takes, gives = config.get("in_channels", channels), config.get("out_channels")
    expected = 2 * channels if learned_variance else channels
    if takes != channels or (gives is not None and gives != expected):
        raise EdadmError(
            f"{source} holds a {name} from {takes} to {gives or takes} channels, model.sample_shape={shape} needs "
            f"{channels} to {expected}: give the weights of this task's model, or the shape of the model's samples"
        )
    labelled = config.get("num_class_embeds") is not None or config.get("class_embed_type") is not None
    wants = name != "UNet2DModel" or labelled
    if wants != conditional:
        raise EdadmError(
            f"{source} holds {'a conditional' if wants else 'an unconditional'} {name}, this task is "
            f"{'conditional' if conditional else 'unconditional'}: give the weights of this task's model, or choose "
            "the task of these weights"
        )
    size = config.get("sample_size")
    if name == "DiTTransformer2DModel" and size is not None and {size} != set(sample_shape[1:]):
        raise EdadmError(
            f"{source} holds a {name} for samples of {size} x {size}, its positions fit no others: "
            f"model.sample_shape is {shape}"
        )


def _name_in(state: Mapping[str, Any], name: str) -> str:
    """Return the name that a folder has for a tensor."""
    if name in state or ".attentions." not in name:
        return name
    for current, early in _EARLY_NAMES.items():
        if (found := name.replace(f".{current}.", f".{early}.")) in state:
            return found
    return name


def _set_attention_heads(model: nn.Module, heads: int) -> None:
    """Give every attention the same number of heads; the class has one head width only (golden README, ldm, 4.4.2)."""
    from diffusers.models.attention_processor import Attention

    for name, module in model.named_modules():
        if isinstance(module, Attention):
            if module.to_q.out_features % heads:
                raise EdadmError(f"{name} has {module.to_q.out_features} channels, not divisible by {heads} heads")
            module.heads = heads
            module.scale = (module.to_q.out_features / heads) ** -0.5


def _set_downscale_freq_shift(model: nn.Module, shift: float) -> None:
    """Set the divisor of the time frequencies, half their width minus shift (golden README, ldm, 4.8.1)."""
    from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings

    for module in model.modules():
        if isinstance(module, CombinedTimestepLabelEmbeddings):
            module.time_proj.downscale_freq_shift = shift


_PATCHES: dict[str, Callable[[nn.Module, Any], None]] = {
    ATTENTION_HEADS: _set_attention_heads,
    DOWNSCALE_FREQ_SHIFT: _set_downscale_freq_shift,
}

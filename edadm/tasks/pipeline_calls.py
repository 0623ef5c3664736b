"""How pipelines of diffusers call the denoisers of each class: shapes, conditions, and what rows become on the way.

All stages give a denoiser a sample (B, C, H, W), times, and conditions with one row per sample by name. `adapt` turns
that into the call of the pipeline where it differs. Source: the pipelines' ``__call__`` in diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from edadm.errors import EdadmError
from edadm.sampling.interface import unwrap

Config = Mapping[str, Any]
Shape = tuple[int, int, int]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]

FEATURES = ("middle_attention_input", "middle_output")  # the names of conf/model/pipeline.yaml
FLUX_SIZE = 128  # of a latent, where nothing is asked for
_CONTEXT, _POOLED = "encoder_hidden_states", "pooled_projections"
ADDED = ("text_embeds", "time_ids", "resolution", "aspect_ratio")  # given as one dictionary, added_cond_kwargs


@dataclass(frozen=True)
class Call:
    """What pipelines give denoisers of one class.

    texts: for each length of what ``encode_prompt`` returns, name -> (place of the condition, of its null or None).
    features: the modules whose output TDAC may read, for FEATURES. tokens: shapes of a text condition without its rows.
    """

    features: Callable[[Config], tuple[str, str]]
    texts: Mapping[int, Mapping[str, tuple[int, int | None]]]
    tokens: Callable[[Config], dict[str, tuple[int, ...]]]
    packed: bool = False

    def channels(self, config: Config) -> int:
        """Return the channels of a sample."""
        return config["in_channels"] // 4 if self.packed else config["in_channels"]

    def shape(self, config: Config, place: str) -> Shape:
        """Return (C, H, W) of the sample that the denoiser was built for. Raises EdadmError when it does not say."""
        size = FLUX_SIZE if self.packed else config.get("sample_size")
        if size is None:
            raise EdadmError(f"{place}: its denoiser does not say its sample size: set model.sample_shape")
        height, width = (size, size) if isinstance(size, int) else size
        return self.channels(config), int(height), int(width)


def _unet(config: Config) -> tuple[str, str]:
    return "mid_block.resnets.0", "mid_block"


def _blocks(config: Config) -> tuple[str, str]:
    """Name the blocks before and in the middle, whose output is the tokens of the image."""
    middle = config["num_layers"] // 2
    return f"transformer_blocks.{max(middle - 1, 0)}", f"transformer_blocks.{middle}"


def _joint(config: Config) -> tuple[str, str]:
    """Name modules of the middle block that see the image tokens alone: its block returns the context first."""
    middle = f"transformer_blocks.{config['num_layers'] // 2}"
    return f"{middle}.norm1", f"{middle}.ff"


def _nothing(config: Config) -> dict[str, tuple[int, ...]]:
    return {}


def _unet_text(config: Config) -> dict[str, tuple[int, ...]]:
    width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    context: dict[str, tuple[int, ...]] = {_CONTEXT: (77, width if isinstance(width, int) else width[0])}
    if config.get("addition_embed_type") != "text_time":
        return context
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return context | {"text_embeds": (pooled,)}


def _pixart_text(config: Config) -> dict[str, tuple[int, ...]]:
    return {_CONTEXT: (120, config["caption_channels"]), "encoder_attention_mask": (120,)}


def _joint_text(tokens: int) -> Callable[[Config], dict[str, tuple[int, ...]]]:
    return lambda config: {
        _CONTEXT: (tokens, config["joint_attention_dim"]),
        _POOLED: (config["pooled_projection_dim"],),
    }


CALLS = {
    "UNet2DModel": Call(_unet, {}, _nothing),
    "UNet2DConditionModel": Call(
        _unet, {2: {_CONTEXT: (0, 1)}, 4: {_CONTEXT: (0, 1), "text_embeds": (2, 3)}}, _unet_text
    ),
    "DiTTransformer2DModel": Call(_blocks, {}, _nothing),
    "PixArtTransformer2DModel": Call(_blocks, {4: {_CONTEXT: (0, 2), "encoder_attention_mask": (1, 3)}}, _pixart_text),
    "SD3Transformer2DModel": Call(_joint, {4: {_CONTEXT: (0, 1), _POOLED: (2, 3)}}, _joint_text(333)),
    "FluxTransformer2DModel": Call(
        _joint, {3: {_CONTEXT: (0, None), _POOLED: (1, None)}}, _joint_text(512), packed=True
    ),
}


def embeds_guidance(class_name: str, config: Config) -> bool:
    """Say whether the guidance scale is an input of the denoiser, or none at all, instead of a second row."""
    return CALLS[class_name].packed or config.get("time_cond_proj_dim") is not None


def constants(class_name: str, config: Config, pixels: tuple[int, int], guidance_scale: float) -> dict[str, Tensor]:
    """Return the conditions that are equal for all images, one row each: sizes and an embedded guidance scale.

    pixels: height and width of an image.
    """
    found: dict[str, Tensor] = {}
    if class_name == "UNet2DConditionModel" and config.get("addition_embed_type") == "text_time":
        found["time_ids"] = torch.tensor([[*pixels, 0.0, 0.0, *pixels]])  # original size, corner of the crop, target
    if class_name == "UNet2DConditionModel" and (width := config.get("time_cond_proj_dim")) is not None:
        found["timestep_cond"] = _embedded(guidance_scale - 1, width)
    if class_name == "PixArtTransformer2DModel" and config["sample_size"] == FLUX_SIZE:
        found |= {
            "resolution": torch.tensor([pixels], dtype=torch.float32),
            "aspect_ratio": torch.tensor([[pixels[0] / pixels[1]]]),
        }
    if class_name == "FluxTransformer2DModel" and config["guidance_embeds"]:
        found["guidance"] = torch.tensor([float(guidance_scale)])
    return found


def _embedded(scale: float, width: int) -> Tensor:
    """Embed a guidance scale (1, width) as latent consistency models take it (Luo et al. 2023)."""
    half = width // 2
    angles = 1000 * scale * torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()]), (0, width - 2 * half))[None]


def adapt(model: nn.Module, class_name: str, shape: Shape) -> nn.Module:
    """Make a denoiser take rows as all stages give them: (B, *shape), times, conditions by name. Returns it."""
    model.register_forward_pre_hook(_name, with_kwargs=True)
    if CALLS[class_name].packed:
        model.register_forward_pre_hook(partial(_pack, shape), with_kwargs=True)
        model.register_forward_hook(partial(_unpack, shape))
    return model


def _name(model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Arguments:
    """Name the times, which are no second argument everywhere, and put added conditions into one dictionary."""
    x, *times = args
    added = {name: named[name] for name in ADDED if name in named}
    rest = {name: value for name, value in named.items() if name not in added}
    rest |= {"timestep": times[0]} if times else {}
    return (x,), rest | ({"added_cond_kwargs": added} if added else {})


def _pack(shape: Shape, model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Arguments:
    """Make tokens of 2 x 2 patches; give their places and those of the text, which are all 0."""
    (x,) = args
    rows, columns = shape[1] // 2, shape[2] // 2
    tokens = x.unflatten(3, (columns, 2)).unflatten(2, (rows, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).flatten(0, 1)
    places = {
        "img_ids": torch.cat([torch.zeros(len(grid), 1), grid], 1).to(x.device, x.dtype),
        "txt_ids": torch.zeros(named[_CONTEXT].shape[1], 3, device=x.device, dtype=x.dtype),
    }
    return (tokens,), named | places | {"timestep": named["timestep"].to(x.dtype)}


def _unpack(shape: Shape, model: nn.Module, args: tuple[Any, ...], output: Any) -> tuple[Tensor]:
    """Make (B, C, H, W) of tokens of 2 x 2 patches."""
    rows, columns = shape[1] // 2, shape[2] // 2
    patches = unwrap(output).unflatten(2, (-1, 2, 2)).unflatten(1, (rows, columns))
    return (patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3),)

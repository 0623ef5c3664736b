"""Turn the UNets of latent diffusion and Stable Diffusion v1 (CompVis ``UNetModel``) into diffusers modules.

Source of the rules: golden README, ldm, 4.2 to 4.6 and 11. Without a spatial transformer the target is
``UNet2DModel``, with one ``UNet2DConditionModel``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from edadm.tasks.conversion import Source, convert, fill, original_arguments, refuse
from edadm.tasks.model_folder import ATTENTION_HEADS, empty_model

PREFIX = "model.diffusion_model."


@dataclass(frozen=True)
class UNetParams:
    """Arguments of the original constructor under its names; -1 and None mean what they mean there.

    attention_resolutions: down-sampling factors of the levels with attention. num_head_channels: width of a head,
    else num_heads is their number at every level. norm_groups: groups of every GroupNorm, 32 in the original code.
    """

    image_size: int
    in_channels: int
    out_channels: int
    model_channels: int
    attention_resolutions: tuple[int, ...]
    num_res_blocks: int
    channel_mult: tuple[int, ...] = (1, 2, 4, 8)
    num_heads: int = -1
    num_head_channels: int = -1
    use_spatial_transformer: bool = False
    transformer_depth: int = 1
    context_dim: int | None = None
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    norm_groups: int = 32

    def __post_init__(self) -> None:
        problems = []
        if (self.num_heads == -1) == (self.num_head_channels == -1):
            problems.append("exactly one of num_heads and num_head_channels must be given")
        if self.use_spatial_transformer != (self.context_dim is not None):
            problems.append("use_spatial_transformer and context_dim belong together")
        if self.use_spatial_transformer and (self.use_scale_shift_norm or self.resblock_updown):
            problems.append("a spatial transformer with use_scale_shift_norm or resblock_updown")
        refuse(problems, "a CompVis UNet with these parameters cannot be converted")

    @property
    def widths(self) -> list[int]:
        """Channels of each level, highest resolution first."""
        return [self.model_channels * factor for factor in self.channel_mult]

    def has_attention(self, level: int) -> bool:
        return 2**level in self.attention_resolutions

    def heads(self, channels: int) -> int:
        return self.num_heads if self.num_heads != -1 else channels // self.num_head_channels


LSUN_BEDROOM = UNetParams(
    image_size=64,
    in_channels=3,
    out_channels=3,
    model_channels=224,
    attention_resolutions=(8, 4, 2),
    num_res_blocks=2,
    channel_mult=(1, 2, 3, 4),
    num_head_channels=32,
)
LSUN_CHURCH = UNetParams(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=192,
    attention_resolutions=(1, 2, 4, 8),
    num_res_blocks=2,
    channel_mult=(1, 2, 2, 4, 4),
    num_heads=8,
    use_scale_shift_norm=True,
    resblock_updown=True,
)
CIN256_V2 = UNetParams(
    image_size=64,
    in_channels=3,
    out_channels=3,
    model_channels=192,
    attention_resolutions=(8, 4, 2),
    num_res_blocks=2,
    channel_mult=(1, 2, 3, 5),
    num_heads=1,
    use_spatial_transformer=True,
    context_dim=512,
)
SD_V1 = UNetParams(
    image_size=64,  # of 512-pixel images; the original yaml says 32 and does not use it
    in_channels=4,
    out_channels=4,
    model_channels=320,
    attention_resolutions=(4, 2, 1),
    num_res_blocks=2,
    channel_mult=(1, 2, 4, 4),
    num_heads=8,
    use_spatial_transformer=True,
    context_dim=768,
)

# without effect on the network's output in evaluation mode
_WITHOUT_EFFECT = {"use_checkpoint", "use_fp16", "dropout", "legacy"}
_FIXED = {
    "dims": 2,
    "conv_resample": True,
    "num_classes": None,
    "num_heads_upsample": -1,
    "use_new_attention_order": False,
    "n_embed": None,
}


def unet_params(params: Mapping[str, Any], norm_groups: int = 32) -> UNetParams:
    """Read the ``params`` of an original yaml. Raises EdadmError naming those that cannot be converted."""
    arguments = original_arguments(params, UNetParams, _WITHOUT_EFFECT, _FIXED, "a CompVis UNet")
    return UNetParams(**{"norm_groups": norm_groups, **arguments})


def unet_config(params: UNetParams) -> tuple[str, dict[str, Any]]:
    """Return the diffusers class and its config, a field of `edadm.tasks.model_folder` included where it is needed."""
    common = {
        "sample_size": params.image_size,
        "in_channels": params.in_channels,
        "out_channels": params.out_channels,
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "down_block_types": [_block_type(params, level, "Down") for level in range(len(params.widths))],
        "up_block_types": [_block_type(params, level, "Up") for level in reversed(range(len(params.widths)))],
        "block_out_channels": params.widths,
        "layers_per_block": params.num_res_blocks,
        "downsample_padding": 1,
        "act_fn": "silu",
        "norm_num_groups": params.norm_groups,
        "norm_eps": 1e-5,
    }
    if params.use_spatial_transformer:
        return "UNet2DConditionModel", common | _conditional(params)
    return "UNet2DModel", common | _unconditional(params)


def _conditional(params: UNetParams) -> dict[str, Any]:
    heads = [params.heads(width) for width in params.widths]
    return {
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "cross_attention_dim": params.context_dim,
        "transformer_layers_per_block": params.transformer_depth,
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,  # this class means the number of heads
        "use_linear_projection": False,
        "only_cross_attention": False,
        "upcast_attention": False,
    }


def _unconditional(params: UNetParams) -> dict[str, Any]:
    resampling = "resnet" if params.resblock_updown else "conv"
    config = {
        "time_embedding_type": "positional",
        "mid_block_type": "UNetMidBlock2D",
        "downsample_type": resampling,
        "upsample_type": resampling,
        "attention_head_dim": params.num_head_channels,  # this class means the width of a head
        "attn_norm_num_groups": params.norm_groups,  # unset, scale_shift drops the norm of the middle attention
        "resnet_time_scale_shift": "scale_shift" if params.use_scale_shift_norm else "default",
        "add_attention": True,
    }
    if params.num_heads != -1:
        config |= {"attention_head_dim": params.model_channels // params.num_heads, ATTENTION_HEADS: params.num_heads}
    return config


def _block_type(params: UNetParams, level: int, direction: str) -> str:
    if params.has_attention(level):
        return f"{'CrossAttn' if params.use_spatial_transformer else 'Attn'}{direction}Block2D"
    return f"Resnet{direction}sampleBlock2D" if params.resblock_updown else f"{direction}Block2D"


_OUTER = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "proj_out"}
_BLOCK = re.compile(r"((?:(?:down|up)_blocks\.\d+|mid_block)\.[a-z]+\.\d+)\.(.+)")


def source_of(name: str, params: UNetParams) -> Source:
    """Return the origin of a diffusers tensor, its key without the checkpoint's prefix."""
    module, _, kind = name.rpartition(".")
    if module in _OUTER:
        return Source(f"{_OUTER[module]}.{kind}")
    match = _BLOCK.fullmatch(module)
    assert match, name
    block, layer = _original_blocks(params)[match[1]], match[2]
    if ".attentions." not in module:
        layer = _LAYERS.get(layer, "op" if match[1].startswith("down") and layer == "conv" else layer)
        return Source(f"{block}.{layer}.{kind}")
    if params.use_spatial_transformer:
        return Source(f"{block}.{layer}.{kind}")
    key = f"{block}.{_ATTENTION[layer]}.{kind}"
    if layer in ("to_q", "to_k", "to_v"):
        return Source(key, partial(_of_each_head, part=("to_q", "to_k", "to_v").index(layer), params=params))
    return Source(key, drop_trailing_1)


@cache
def _original_blocks(params: UNetParams) -> dict[str, str]:
    """Diffusers block -> original block, for every block that a level may have."""
    names = {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    levels, blocks = len(params.widths), params.num_res_blocks
    for level in range(levels):
        for j in range(blocks):
            names[f"down_blocks.{level}.resnets.{j}"] = f"input_blocks.{1 + level * (blocks + 1) + j}.0"
            names[f"down_blocks.{level}.attentions.{j}"] = f"input_blocks.{1 + level * (blocks + 1) + j}.1"
        names[f"down_blocks.{level}.downsamplers.0"] = f"input_blocks.{(level + 1) * (blocks + 1)}.0"
    for up in range(levels):
        for j in range(blocks + 1):
            names[f"up_blocks.{up}.resnets.{j}"] = f"output_blocks.{up * (blocks + 1) + j}.0"
            names[f"up_blocks.{up}.attentions.{j}"] = f"output_blocks.{up * (blocks + 1) + j}.1"
        place = 2 if params.has_attention(levels - 1 - up) else 1
        names[f"up_blocks.{up}.upsamplers.0"] = f"output_blocks.{up * (blocks + 1) + blocks}.{place}"
    return names


def drop_trailing_1(tensor: Tensor) -> Tensor:
    """Return a 1x1 convolution's weight as a linear layer's; other tensors as they are."""
    while tensor.ndim > 2 and tensor.shape[-1] == 1:
        tensor = tensor.squeeze(-1)
    return tensor


def _of_each_head(tensor: Tensor, part: int, params: UNetParams) -> Tensor:
    """Take q, k or v (part 0, 1, 2) of a fused projection whose output runs over (head, part, channel)."""
    per_head = tensor.unflatten(0, (params.heads(tensor.shape[0] // 3), 3, -1))
    return drop_trailing_1(per_head[:, part].flatten(0, 1))


def convert_unet(state: Mapping[str, Tensor], params: UNetParams, file: str) -> nn.Module:
    """Return the UNet of original tensors without prefix, in float32 and evaluation mode.

    Raises EdadmError naming missing, unexpected and mis-shaped original keys.
    """
    model = empty_model(*unet_config(params))
    return fill(model, convert(state, partial(source_of, params=params), model, file), file)

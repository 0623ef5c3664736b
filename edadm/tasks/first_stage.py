"""Turn the first stages of latent diffusion (VQ-f4, KL-f8) into diffusers' ``VQModel`` and ``AutoencoderKL``.

Source of the rules: golden README, ldm, 4.7 and 11.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from edadm.tasks.architecture import FIRST_STAGE, require
from edadm.tasks.checkpoint_file import read_file, state_dict
from edadm.tasks.compvis_unet import drop_trailing_1
from edadm.tasks.conversion import Source, convert, fill, original_arguments, refuse
from edadm.tasks.model_folder import empty_model

PREFIX = "first_stage_model."


@dataclass(frozen=True)
class FirstStageParams:
    """Arguments of the original constructor and its ``ddconfig`` under their names.

    n_embed: entries of the codebook of a VQ model, None for a KL model. norm_groups: 32 in the original code.
    """

    embed_dim: int
    z_channels: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    n_embed: int | None = None
    resolution: int = 256
    in_channels: int = 3
    out_ch: int = 3
    norm_groups: int = 32

    def __post_init__(self) -> None:
        if self.n_embed is None and self.embed_dim != self.z_channels:
            refuse([f"embed_dim={self.embed_dim}, z_channels={self.z_channels}"], "a KL model with unequal channels")


VQ_F4 = FirstStageParams(embed_dim=3, n_embed=8192, z_channels=3, ch=128, ch_mult=(1, 2, 4), num_res_blocks=2)
KL_F8 = FirstStageParams(embed_dim=4, z_channels=4, ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2)

_WITHOUT_EFFECT = {"ddconfig", "dropout", "lossconfig", "monitor", "ckpt_path", "ignore_keys", "image_key"}


def first_stage_params(params: Mapping[str, Any], norm_groups: int = 32) -> FirstStageParams:
    """Read the ``params`` of an original yaml. Raises EdadmError naming those that cannot be converted."""
    flat = {**params, **params.get("ddconfig", {})}
    is_kl = flat.get("n_embed") is None
    fixed = {"double_z": is_kl, "attn_resolutions": []}  # attention in the middle only
    arguments = original_arguments(flat, FirstStageParams, _WITHOUT_EFFECT, fixed, "a first stage")
    return FirstStageParams(**{"norm_groups": norm_groups, **arguments})


def first_stage_config(params: FirstStageParams, scale_factor: float) -> tuple[str, dict[str, Any]]:
    """Return the diffusers class and its config."""
    levels = len(params.ch_mult)
    common = {
        "in_channels": params.in_channels,
        "out_channels": params.out_ch,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": [params.ch * factor for factor in params.ch_mult],
        "layers_per_block": params.num_res_blocks,
        "act_fn": "silu",
        "latent_channels": params.z_channels,
        "norm_num_groups": params.norm_groups,
        "sample_size": params.resolution,
        "scaling_factor": scale_factor,
        "mid_block_add_attention": True,
    }
    if params.n_embed is None:
        quantization = {"force_upcast": False, "use_quant_conv": True, "use_post_quant_conv": True}
        return "AutoencoderKL", common | quantization
    codebook = {"num_vq_embeddings": params.n_embed, "vq_embed_dim": params.embed_dim}
    return "VQModel", common | codebook | {"norm_type": "group", "lookup_from_codebook": False}


_RENAMED = {
    "resnets.": "block.",
    "downsamplers.0.": "downsample.",
    "upsamplers.0.": "upsample.",
    "conv_shortcut.": "nin_shortcut.",
    "conv_norm_out.": "norm_out.",
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
}
_RENAMED_PARTS = re.compile("|".join(re.escape(part) for part in sorted(_RENAMED, key=len, reverse=True)))


def source_of(name: str, params: FirstStageParams) -> Source:
    """Return the origin of a diffusers tensor, its key without the checkpoint's prefix."""
    levels = len(params.ch_mult)
    key = re.sub(r"^encoder\.down_blocks\.", "encoder.down.", name)
    key = re.sub(r"^decoder\.up_blocks\.(\d+)", lambda match: f"decoder.up.{levels - 1 - int(match[1])}", key)
    key = _RENAMED_PARTS.sub(lambda match: _RENAMED[match[0]], key)
    return Source(key, drop_trailing_1) if ".attentions." in name else Source(key)


def convert_first_stage(
    state: Mapping[str, Tensor], params: FirstStageParams, scale_factor: float, file: str
) -> nn.Module:
    """Return the autoencoder of original tensors without prefix, in float32 and evaluation mode.

    scale_factor: latents are scale_factor times what the encoder gives; kept as ``config.scaling_factor``.
    Raises EdadmError naming missing, unexpected and mis-shaped original keys; the loss's are left out.
    """
    model = empty_model(*first_stage_config(params, scale_factor))
    own = {key: tensor for key, tensor in state.items() if not key.startswith("loss.")}
    return fill(model, convert(own, partial(source_of, params=params), model, file), file)


def load_first_stage(path: str | Path, params: FirstStageParams, scale_factor: float) -> nn.Module:
    """Read the checkpoint of a first stage alone; see `convert_first_stage`.

    One inside a latent diffusion checkpoint is read by `edadm.tasks.ldm_checkpoint.load_ldm`.
    Raises EdadmError also for an unreadable file and for another architecture, which it names.
    """
    state = state_dict(read_file(path), str(path), section="state_dict")
    require(FIRST_STAGE, state, str(path))
    return convert_first_stage(state, params, scale_factor, str(path))

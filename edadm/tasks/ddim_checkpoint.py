"""Read the original DDIM CIFAR-10 checkpoint layout (pesser/pytorch_diffusion) into ``UNet2DModel``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edadm.errors import EdadmError
from edadm.tasks.architecture import DDIM, require
from edadm.tasks.checkpoint_file import read_file, state_dict
from edadm.tasks.conversion import refuse

_PARTS = {
    "temb_proj": "time_emb_proj",
    "nin_shortcut": "conv_shortcut",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}
_RESAMPLERS = {"downsample": "downsamplers.0", "upsample": "upsamplers.0"}
_SINGLE = {
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_MIDDLE = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}


def module_name(official: str, levels: int) -> str:
    """Translate an original module name to the diffusers one.

    levels: number of resolutions; the original counts ``up`` by resolution, diffusers by execution.
    Raises EdadmError for a name that this layout does not have.
    """
    if official in _SINGLE:
        return _SINGLE[official]
    if match := re.fullmatch(r"mid\.(block_1|attn_1|block_2)\.(\w+)", official):
        return f"mid_block.{_MIDDLE[match[1]]}.{_PARTS.get(match[2], match[2])}"
    if match := re.fullmatch(r"(down|up)\.(\d+)\.(.+)", official):
        level = int(match[2]) if match[1] == "down" else levels - 1 - int(match[2])
        return f"{match[1]}_blocks.{level}.{_level_name(match[3], official)}"
    raise EdadmError(f"unknown module {official!r} in a DDIM checkpoint: is it one of the original CIFAR-10 layout?")


def _level_name(rest: str, official: str) -> str:
    if match := re.fullmatch(r"(block|attn)\.(\d+)\.(\w+)", rest):
        kind = "resnets" if match[1] == "block" else "attentions"
        return f"{kind}.{match[2]}.{_PARTS.get(match[3], match[3])}"
    if match := re.fullmatch(r"(downsample|upsample)\.conv", rest):
        return f"{_RESAMPLERS[match[1]]}.conv"
    raise EdadmError(f"unknown module {official!r} in a DDIM checkpoint: is it one of the original CIFAR-10 layout?")


def convert(state: Mapping[str, torch.Tensor], levels: int) -> dict[str, torch.Tensor]:
    """Rename the tensors of an original state dict; attention projections lose their 1x1 kernel axes."""
    converted = {}
    for key, tensor in state.items():
        module, _, kind = key.rpartition(".")
        name = module_name(module, levels)
        is_projection = ".attentions." in name and kind == "weight" and tensor.ndim == 4
        converted[f"{name}.{kind}"] = tensor[:, :, 0, 0] if is_projection else tensor
    return converted


def load_state(model: nn.Module, state: Mapping[str, torch.Tensor], source: str) -> nn.Module:
    """Load ``state`` strictly. Raises EdadmError naming missing, unexpected and mis-shaped keys and bad values."""
    expected = model.state_dict()
    problems = [f"missing {key}" for key in expected if key not in state]
    problems += [f"unexpected {key}" for key in state if key not in expected]
    for key in sorted(expected.keys() & state.keys()):
        if expected[key].shape != state[key].shape:
            problems.append(f"{key} has shape {tuple(state[key].shape)}, expected {tuple(expected[key].shape)}")
        elif state[key].is_floating_point() and not torch.isfinite(state[key]).all():
            problems.append(f"{key} has NaN or Inf")
    refuse(problems, f"{source} does not fit {type(model).__name__}")
    model.load_state_dict({key: tensor.float() for key, tensor in state.items()})
    return model


def load_checkpoint(model: Any, path: str | Path) -> nn.Module:
    """Fill a ``UNet2DModel`` from an original checkpoint file: a pickled state dict or safetensors.

    A training checkpoint (a list whose last item is the EMA shadow) yields its EMA weights.
    """
    loaded = read_file(path)
    state = state_dict(loaded[-1] if isinstance(loaded, list | tuple) else loaded, str(path))
    state = {key.removeprefix("module."): tensor for key, tensor in state.items()}
    require(DDIM, state, str(path))
    return load_state(model, convert(state, len(model.config.block_out_channels)), str(path))


# the network of the checkpoint: three levels of 256 channels below one of 128, attention at 16 x 16
CIFAR10 = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 0,
    "act_fn": "silu",
    "attention_head_dim": None,
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
}

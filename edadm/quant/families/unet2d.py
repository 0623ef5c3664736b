"""The family of diffusers' ``UNet2DModel`` (DDPM and DDIM networks, unconditional latent diffusion).

Names, roles and execution order: methods.md 0.4 and 3.0; skip split: golden README 10.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

ROLES = (
    (r"conv_in", "input"),
    (r"conv_out", "output"),
    (r"time_embedding\.linear_1", "time_mlp_1"),
    (r"time_embedding\.linear_2", "time_mlp_2"),
    (r".*\.conv1", "resnet_conv1"),
    (r".*\.conv2", "resnet_conv2"),
    (r".*\.time_emb_proj", "time_projection"),
    (r".*\.conv_shortcut", "shortcut"),
    (r".*\.to_q", "attention_q"),
    (r".*\.to_k", "attention_k"),
    (r".*\.to_v", "attention_v"),
    (r".*\.to_out\.0", "attention_out"),
    (r".*downsamplers\.\d+\.conv", "downsample"),
    (r".*upsamplers\.\d+\.conv", "upsample"),
)
MAIN_PATH_END = ("resnet_conv2", "attention_out")


def matches(model: nn.Module) -> bool:
    """Tell whether a denoiser belongs to this family."""
    return type(model).__name__ == "UNet2DModel"


def layer_role(name: str) -> str | None:
    """Return the role of a convolution or linear layer by its diffusers name, None if the family does not know it."""
    for pattern, role in ROLES:
        if re.fullmatch(pattern, name):
            return role
    return None


def is_float(name: str) -> bool:
    """Tell whether a layer stays in floating point by definition: the embedding of a class label."""
    return name.startswith("class_embedding.")


def units(model: Any) -> Iterator[str]:
    """Yield the module names of the reconstruction units in execution order."""
    yield from ("time_embedding.linear_1", "time_embedding.linear_2", "conv_in")
    for i, block in enumerate(model.down_blocks):
        yield from _level(f"down_blocks.{i}", block)
    yield from _middle(model.mid_block)
    for i, block in enumerate(model.up_blocks):
        yield from _level(f"up_blocks.{i}", block)
    yield "conv_out"


def _level(prefix: str, block: Any) -> Iterator[str]:
    attentions = getattr(block, "attentions", ())
    for j in range(len(block.resnets)):
        yield f"{prefix}.resnets.{j}"
        if j < len(attentions):
            yield f"{prefix}.attentions.{j}"
    for kind in ("downsamplers", "upsamplers"):
        for j, sampler in enumerate(getattr(block, kind, None) or ()):
            yield f"{prefix}.{kind}.{j}.conv" if hasattr(sampler, "conv") else f"{prefix}.{kind}.{j}"


def _middle(block: Any) -> Iterator[str]:
    if block is None:
        return
    for j in range(len(block.resnets)):
        if j > 0 and block.attentions[j - 1] is not None:
            yield f"mid_block.attentions.{j - 1}"
        yield f"mid_block.resnets.{j}"


def splits(model: Any) -> dict[str, int]:
    """Return for each shortcut of the up path the number of input channels that come from the decoder."""
    skips = [model.conv_in.out_channels]
    for block in model.down_blocks:
        skips += [resnet.out_channels for resnet in block.resnets]
        skips += [skips[-1]] * len(block.downsamplers or ())
    result = {}
    for i, block in enumerate(model.up_blocks):
        for j, resnet in enumerate(block.resnets):
            if resnet.conv_shortcut is not None:
                result[f"up_blocks.{i}.resnets.{j}.conv_shortcut"] = resnet.in_channels - skips.pop()
            else:
                skips.pop()
    return result

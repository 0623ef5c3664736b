"""The family of diffusers' ``UNet2DModel`` (DDPM and DDIM networks, unconditional latent diffusion).

Names, roles and execution order: methods.md 0.4 and 3.0; skip split: golden README 10.2. Residual blocks that resample
(LDM-8 church) are units like the others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edadm.quant.families.blocks import RESIDUAL_BLOCK, attention, mlp
from edadm.quant.families.family import Family


def units(model: Any) -> Iterator[str]:
    """Yield the module names of the reconstruction units in execution order."""
    yield from ("time_embedding.linear_1", "time_embedding.linear_2", "conv_in")
    yield from levels(model)
    yield "conv_out"


def levels(model: Any) -> Iterator[str]:
    """Yield the units of a U-Net's down, middle and up path in execution order."""
    for i, block in enumerate(model.down_blocks):
        yield from _level(f"down_blocks.{i}", block)
    yield from _middle(model.mid_block)
    for i, block in enumerate(model.up_blocks):
        yield from _level(f"up_blocks.{i}", block)


def _level(prefix: str, block: Any) -> Iterator[str]:
    attentions = getattr(block, "attentions", ())
    for j in range(len(block.resnets)):
        yield f"{prefix}.resnets.{j}"
        if j < len(attentions):
            yield from _attention(f"{prefix}.attentions.{j}", attentions[j])
    for kind in ("downsamplers", "upsamplers"):
        for j, sampler in enumerate(getattr(block, kind, None) or ()):
            yield f"{prefix}.{kind}.{j}.conv" if hasattr(sampler, "conv") else f"{prefix}.{kind}.{j}"


def _middle(block: Any) -> Iterator[str]:
    if block is None:
        return
    for j in range(len(block.resnets)):
        if j > 0 and block.attentions[j - 1] is not None:
            yield from _attention(f"mid_block.attentions.{j - 1}", block.attentions[j - 1])
        yield f"mid_block.resnets.{j}"


def _attention(name: str, module: Any) -> Iterator[str]:
    """Yield a spatial attention as a whole; of a transformer, its projections and each of its blocks."""
    if hasattr(module, "to_q"):
        yield name
    else:
        yield f"{name}.proj_in"
        yield from (f"{name}.transformer_blocks.{k}" for k in range(len(module.transformer_blocks)))
        yield f"{name}.proj_out"


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


UNET_ROLES = (
    ("conv_in", "input"),
    ("conv_out", "output"),
    *mlp(r"time_embedding\.", "time_mlp"),
    *RESIDUAL_BLOCK,
    (r".*downsamplers\.\d+\.conv", "downsample"),
    (r".*upsamplers\.\d+\.conv", "upsample"),
)

FAMILY = Family(
    name="unet2d",
    model="UNet2DModel",
    roles=(*UNET_ROLES, *attention(r".*\.")),
    units=units,
    splits=splits,
    main_path_end=("resnet_conv2", "attention_out"),
    float_layers=r"class_embedding\..*",
)

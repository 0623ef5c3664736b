"""The family of diffusers' ``UNet2DConditionModel`` (LDM-4 ImageNet, Stable Diffusion 1, 2 and XL).

Names, roles and execution order: methods.md 0.4 and 3.0. A ``BasicTransformerBlock`` is a unit, ``proj_in`` and
``proj_out`` are layers of their own. The original block registers self-attention, feed-forward, cross-attention in this
order (methods.md 3.4), and its tensors, unlike those of the 1x1 convolutions around it, hold tokens in axis 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edadm.quant.families.blocks import TRANSFORMER_BLOCK, attention, mlp
from edadm.quant.families.family import Family
from edadm.quant.families.unet2d import UNET_ROLES, levels, splits


def units(model: Any) -> Iterator[str]:
    """Yield the module names of the reconstruction units in execution order."""
    if model.time_embedding.cond_proj is not None:
        yield "time_embedding.cond_proj"
    yield from ("time_embedding.linear_1", "time_embedding.linear_2")
    if getattr(model, "add_embedding", None) is not None:
        yield from ("add_embedding.linear_1", "add_embedding.linear_2")
    if model.encoder_hid_proj is not None:
        yield "encoder_hid_proj"
    yield "conv_in"
    yield from levels(model)
    yield "conv_out"


FAMILY = Family(
    name="unet2d_condition",
    model="UNet2DConditionModel",
    roles=(
        *UNET_ROLES,
        (r"time_embedding\.cond_proj", "guidance_projection"),
        *mlp(r"add_embedding\.", "added_mlp"),
        ("encoder_hid_proj", "context_projection"),
        (r".*\.attentions\.\d+\.proj_in", "proj_in"),
        *TRANSFORMER_BLOCK,
        (r".*\.attentions\.\d+\.proj_out", "proj_out"),
        *attention(r".*\.attentions\.\d+\."),
    ),
    units=units,
    splits=splits,
    main_path_end=("resnet_conv2", "feed_forward_out", "attention_out"),
    last_registered=("cross_attention_out",),
    float_layers=r"class_embedding(\..*)?",
    tokens=r".*\.(transformer_blocks\..*|proj_in|proj_out)",
)

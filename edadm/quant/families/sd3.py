"""The family of diffusers' ``SD3Transformer2DModel`` (Stable Diffusion 3 and 3.5).

A joint block, whose image and context tokens attend together, is a unit with two streams in and out; the last one drops
the context. The patch convolution, the embeddings and the final layers are layers of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edadm.quant.families.blocks import attention, feed_forward, joint_projections, mlp
from edadm.quant.families.family import Family


def units(model: Any) -> Iterator[str]:
    """Yield the module names of the reconstruction units in execution order."""
    embeddings = ("timestep_embedder", "text_embedder")
    yield "pos_embed.proj"
    yield from (f"time_text_embed.{name}.linear_{i}" for name in embeddings for i in (1, 2))
    yield "context_embedder"
    yield from (f"transformer_blocks.{i}" for i in range(len(model.transformer_blocks)))
    yield from ("norm_out.linear", "proj_out")


FAMILY = Family(
    name="sd3",
    model="SD3Transformer2DModel",
    roles=(
        (r"pos_embed\.proj", "input"),
        *mlp(r"time_text_embed\.timestep_embedder\.", "time_mlp"),
        *mlp(r"time_text_embed\.text_embedder\.", "pooled_mlp"),
        ("context_embedder", "context_projection"),
        (r".*\.norm1\.linear", "modulation"),
        (r".*\.norm1_context\.linear", "context_modulation"),
        *joint_projections(r".*\.attn\."),
        (r".*\.attn\.to_add_out", "context_out"),
        (r".*\.attn\.to_out\.0", "attention_out"),
        *attention(r".*\.attn2\.", "second_attention"),
        *feed_forward(r".*\.ff\."),
        *feed_forward(r".*\.ff_context\.", "context_feed_forward"),
        (r"norm_out\.linear", "output_modulation"),
        ("proj_out", "output"),
    ),
    units=units,
    tokens=r".*",
)

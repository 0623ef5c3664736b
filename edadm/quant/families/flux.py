"""The family of diffusers' ``FluxTransformer2DModel`` (FLUX.1).

A block is a unit, whether it keeps image and context tokens apart (``transformer_blocks``) or attends and feeds forward
in one stream (``single_transformer_blocks``); embeddings and final layers are layers of their own. The rotary embedding
holds one value for all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edadm.quant.families.blocks import feed_forward, joint_projections, mlp
from edadm.quant.families.family import Family


def units(model: Any) -> Iterator[str]:
    """Yield the module names of the reconstruction units in execution order."""
    guidance = ("guidance_embedder",) if hasattr(model.time_text_embed, "guidance_embedder") else ()
    embeddings = ("timestep_embedder", *guidance, "text_embedder")
    yield "x_embedder"
    yield from (f"time_text_embed.{name}.linear_{i}" for name in embeddings for i in (1, 2))
    yield "context_embedder"
    for kind in ("transformer_blocks", "single_transformer_blocks"):
        yield from (f"{kind}.{i}" for i in range(len(getattr(model, kind))))
    yield from ("norm_out.linear", "proj_out")


FAMILY = Family(
    name="flux",
    model="FluxTransformer2DModel",
    roles=(
        ("x_embedder", "input"),
        *mlp(r"time_text_embed\.timestep_embedder\.", "time_mlp"),
        *mlp(r"time_text_embed\.guidance_embedder\.", "guidance_mlp"),
        *mlp(r"time_text_embed\.text_embedder\.", "pooled_mlp"),
        ("context_embedder", "context_projection"),
        (r".*\.(norm|norm1)\.linear", "modulation"),
        (r".*\.norm1_context\.linear", "context_modulation"),
        (r".*\.proj_mlp", "feed_forward_in"),
        *joint_projections(r".*\.attn\."),
        (r".*\.attn\.to_out\.0", "attention_out"),
        (r".*\.attn\.to_add_out", "context_out"),
        *feed_forward(r".*\.ff\."),
        *feed_forward(r".*\.ff_context\.", "context_feed_forward"),
        (r"single_transformer_blocks\.\d+\.proj_out", "feed_forward_out"),
        (r"norm_out\.linear", "output_modulation"),
        ("proj_out", "output"),
    ),
    units=units,
    tokens=r".*",
    shared_arguments=("image_rotary_emb",),
)

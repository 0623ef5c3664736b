"""The family of diffusers' ``PixArtTransformer2DModel`` (PixArt-alpha and -sigma).

A transformer block is a unit; the patch convolution, the embeddings of timestep, size and caption, the modulation that
all blocks share, and the final layer are layers of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from edadm.quant.families.blocks import TRANSFORMER_BLOCK, mlp
from edadm.quant.families.family import Family


def units(model: Any) -> Iterator[str]:
    """Yield the module names of the reconstruction units in execution order."""
    embeddings = ["timestep_embedder"]
    if model.adaln_single.emb.use_additional_conditions:
        embeddings += ["resolution_embedder", "aspect_ratio_embedder"]
    yield "pos_embed.proj"
    yield from (f"adaln_single.emb.{name}.linear_{i}" for name in embeddings for i in (1, 2))
    yield "adaln_single.linear"
    if model.caption_projection is not None:
        yield from ("caption_projection.linear_1", "caption_projection.linear_2")
    yield from (f"transformer_blocks.{i}" for i in range(len(model.transformer_blocks)))
    yield "proj_out"


FAMILY = Family(
    name="pixart",
    model="PixArtTransformer2DModel",
    roles=(
        (r"pos_embed\.proj", "input"),
        *mlp(r"adaln_single\.emb\.timestep_embedder\.", "time_mlp"),
        *mlp(r"adaln_single\.emb\.resolution_embedder\.", "resolution_mlp"),
        *mlp(r"adaln_single\.emb\.aspect_ratio_embedder\.", "aspect_ratio_mlp"),
        (r"adaln_single\.linear", "modulation"),
        *mlp(r"caption_projection\.", "context_mlp"),
        *TRANSFORMER_BLOCK,
        ("proj_out", "output"),
    ),
    units=units,
    tokens=r".*",
)

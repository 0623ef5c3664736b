"""The family of diffusers' ``DiTTransformer2DModel`` (DiT with adaLN-Zero and class labels).

A transformer block is a unit, the patch convolution and the two final layers are layers of their own. diffusers keeps
the timestep MLP and the table of classes once in every block (golden/ldm README 4.8), where the original has one for
all: each copy belongs to its block, and that of the first block runs again for the final layers. Copies of a converted
checkpoint are equal and count once; a network that diffusers has trained has different ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from edadm.quant.families.blocks import TRANSFORMER_BLOCK, mlp
from edadm.quant.families.family import Family


def units(model: Any) -> Iterator[str]:
    """Yield the module names of the reconstruction units in execution order."""
    yield "pos_embed.proj"
    yield from (f"transformer_blocks.{i}" for i in range(len(model.transformer_blocks)))
    yield from ("proj_out_1", "proj_out_2")


def original_of(name: str) -> str:
    """Return the module of the first block for one of the embedders that the original network has once."""
    return re.sub(r"^transformer_blocks\.\d+\.norm1\.emb\.", "transformer_blocks.0.norm1.emb.", name)


FAMILY = Family(
    name="dit",
    model="DiTTransformer2DModel",
    roles=(
        (r"pos_embed\.proj", "input"),
        *mlp(r".*\.norm1\.emb\.timestep_embedder\.", "time_mlp"),
        (r".*\.norm1\.linear", "modulation"),
        *TRANSFORMER_BLOCK,
        ("proj_out_1", "output_modulation"),
        ("proj_out_2", "output"),
    ),
    units=units,
    tokens=r".*",
    runs_again=r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_[12]",
    original_of=original_of,
    tables=("pos_embed.pos_embed",),
)

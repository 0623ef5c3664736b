"""Turn original DiT checkpoints (facebookresearch/DiT) into diffusers' ``DiTTransformer2DModel``.

Source of the rules: golden README, ldm, 4.8 and 11.5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edadm.errors import EdadmError
from edadm.tasks.architecture import DIT, require
from edadm.tasks.checkpoint_file import read_file, state_dict
from edadm.tasks.conversion import Source, convert, fill, original_arguments
from edadm.tasks.model_folder import DOWNSCALE_FREQ_SHIFT, empty_model


@dataclass(frozen=True)
class DiTParams:
    """Arguments of the original constructor under its names. The class table has one more row, the null class."""

    input_size: int
    patch_size: int
    in_channels: int
    hidden_size: int
    depth: int
    num_heads: int
    num_classes: int = 1000
    learn_sigma: bool = True


DIT_XL_2_256 = DiTParams(input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16)

SCALE_FACTOR = 0.18215  # of the Stable Diffusion autoencoder, as in DiT's sampling script


def dit_params(params: Mapping[str, Any]) -> DiTParams:
    """Read the arguments of an original model. Raises EdadmError naming those that cannot be converted."""
    if params.get("class_dropout_prob") == 0:
        raise EdadmError("a DiT without class dropout has no null class: diffusers cannot express its class table")
    arguments = original_arguments(params, DiTParams, {"class_dropout_prob"}, {"mlp_ratio": 4.0}, "a DiT")
    return DiTParams(**arguments)


def dit_config(params: DiTParams) -> tuple[str, dict[str, Any]]:
    """Return the diffusers class and its config, with a field of `edadm.tasks.model_folder`."""
    return "DiTTransformer2DModel", {
        "num_attention_heads": params.num_heads,
        "attention_head_dim": params.hidden_size // params.num_heads,
        "in_channels": params.in_channels,
        "out_channels": params.in_channels * (2 if params.learn_sigma else 1),
        "num_layers": params.depth,
        "dropout": 0.0,
        "norm_num_groups": 32,
        "attention_bias": True,
        "sample_size": params.input_size,
        "patch_size": params.patch_size,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": params.num_classes,
        "upcast_attention": False,
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        DOWNSCALE_FREQ_SHIFT: 0,
    }


_OUTER = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
# every block has its own copy of what the original has once
_EMBEDDERS = {
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
}
_LAYERS = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_q": "attn.qkv",
    "attn1.to_k": "attn.qkv",
    "attn1.to_v": "attn.qkv",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
_THIRDS = ("attn1.to_q", "attn1.to_k", "attn1.to_v")


def source_of(name: str) -> Source:
    """Return the origin of a diffusers tensor."""
    module, _, kind = name.rpartition(".")
    if module in _OUTER:
        return Source(f"{_OUTER[module]}.{kind}")
    match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
    assert match, name
    block, layer = match.groups()
    if layer in _EMBEDDERS:
        return Source(f"{_EMBEDDERS[layer]}.{kind}")
    key = f"blocks.{block}.{_LAYERS[layer]}.{kind}"
    return Source(key, partial(_third, part=_THIRDS.index(layer))) if layer in _THIRDS else Source(key)


def _third(tensor: Tensor, part: int) -> Tensor:
    return tensor.unflatten(0, (3, -1))[part]


def convert_dit(state: Mapping[str, Tensor], params: DiTParams, file: str) -> nn.Module:
    """Return the transformer of original tensors, in float32 and evaluation mode.

    Its class embedding drops labels at random in train mode, in every block by itself: keep it in evaluation mode.
    Raises EdadmError naming missing, unexpected and mis-shaped original keys, and positions that are not the usual
    table, which ``save_pretrained`` would lose.
    """
    model: Any = empty_model(*dit_config(params))
    weights = {key: tensor for key, tensor in state.items() if key != "pos_embed"}
    converted = convert(weights, source_of, model, file)
    computed, stored = model.pos_embed.pos_embed, state.get("pos_embed")
    if stored is None or stored.shape != computed.shape or not torch.allclose(stored.float(), computed, atol=1e-5):
        raise EdadmError(f"{file}: pos_embed is absent or not the sine table of {params.input_size} x patches of DiT")
    return fill(model, converted, file)


def load_dit(path: str | Path, params: DiTParams = DIT_XL_2_256) -> nn.Module:
    """Read an original checkpoint: plain weights, or a training checkpoint, of which the EMA weights are taken.

    Raises EdadmError also for an unreadable file and for another architecture, which it names.
    """
    state = state_dict(read_file(path), str(path), section="ema")
    require(DIT, state, str(path))
    return convert_dit(state, params, str(path))

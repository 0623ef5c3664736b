"""The text tower of a CLIP model of open_clip as the ``text_encoder/`` and ``tokenizer/`` of a diffusers pipeline."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from edadm.metrics.clip import VOCABULARY, ClipNetwork
from experiments.training.loop import half
from experiments.training.tokenizer import write_transformers_tokenizer

_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")
_LAYERS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OUTER = {
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "positional_embedding": "embeddings.position_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}


def write_text_encoder(network: ClipNetwork, clip: Path, folder: Path) -> None:
    """Write ``text_encoder/`` and ``tokenizer/``. clip: the folder of the network, which has its vocabulary."""
    model: Any = network.model
    weight = model.token_embedding.weight
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": weight.shape[0],
        "hidden_size": weight.shape[1],
        "intermediate_size": model.transformer.resblocks[0].mlp.c_fc.out_features,
        "num_hidden_layers": len(model.transformer.resblocks),
        "num_attention_heads": model.transformer.resblocks[0].attn.num_heads,
        "max_position_embeddings": model.context_length,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": model.ln_final.eps,
        "bos_token_id": weight.shape[0] - 2,
        "eos_token_id": weight.shape[0] - 1,
        "pad_token_id": weight.shape[0] - 1,
        "projection_dim": model.text_projection.shape[1],
    }
    place = folder / "text_encoder"
    place.mkdir(parents=True, exist_ok=True)
    save_file(half(text_model_state(model.state_dict())), place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    write_transformers_tokenizer(clip / VOCABULARY, model.context_length, folder / "tokenizer")


def text_model_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the text tower's tensors under the names of published text encoders; the projection is no part of one."""
    found = {f"text_model.{new}": state[old] for old, new in _OUTER.items()}
    for key, tensor in state.items():
        if match := _BLOCK.fullmatch(key):
            layer = f"text_model.encoder.layers.{match[1]}"
            found |= {f"{layer}.{name}": part for name, part in _of_block(match[2], tensor)}
    return found


def _of_block(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    if name.startswith("attn.in_proj_"):
        kind = name.removeprefix("attn.in_proj_")
        return [(f"self_attn.{part}_proj.{kind}", t) for part, t in zip("qkv", torch.chunk(tensor, 3))]
    layer, _, kind = name.rpartition(".")
    return [(f"{_LAYERS[layer]}.{kind}", tensor)]

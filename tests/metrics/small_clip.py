"""A CLIP model of open_clip's classes with random weights, as a folder that ``local-dir:`` names."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from edadm.metrics import clip

IMAGE_SIZE, PATCH, CONTEXT, EMBED = 28, 14, 16, 12
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
CONFIG = {
    "model_cfg": {
        "embed_dim": EMBED,
        "quick_gelu": True,
        "vision_cfg": {"image_size": IMAGE_SIZE, "layers": 2, "width": 32, "head_width": 16, "patch_size": PATCH},
        "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    },
    "preprocess_cfg": {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"},
}


def write_clip(folder: Path, seed: int = 0) -> Path:
    """Write configuration and weights; every tensor is random, so that none can be forgotten unnoticed."""
    import open_clip

    folder.mkdir(parents=True)
    (folder / clip.CONFIG).write_text(json.dumps(CONFIG), encoding="utf-8")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        empty = open_clip.CLIP(**CONFIG["model_cfg"])
    state = {}
    for name, tensor in empty.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        is_gain = ".ln_" in f".{name}" and name.endswith("weight")
        state[name] = 1 + 0.2 * noise if is_gain else 0.3 * noise
    save_file(state, folder / clip.FILES[0])
    return folder

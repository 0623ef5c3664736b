"""The latents of all training images, and of their mirror images, computed once and kept in the cache."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from edadm.errors import EdadmError
from edadm.store import atomic_file, cache_root, content_hash, file_sha256
from edadm.tasks.model_folder import load_model
from experiments.training.data import to_unit_range
from experiments.training.loop import WEIGHTS

ENCODED_AT_ONCE = 250
VAE = "vae"  # the sub-folder of an exported autoencoder


def encoded(autoencoder: Path, images: np.ndarray, device: torch.device) -> Tensor:
    """Return latents float32 (2, N, c, h, w) on the device: of the images, and of the mirrored ones.

    autoencoder: a folder with ``vae/``. A latent is the mean of its posterior times the scaling factor.
    Raises EdadmError where there is none.
    """
    if not (autoencoder / VAE / WEIGHTS).is_file():
        raise EdadmError(f"no autoencoder in {autoencoder}: train it (first_stage), or name its folder (--autoencoder)")
    parts = [file_sha256(autoencoder / VAE / name) for name in ("config.json", WEIGHTS)]
    key = content_hash([*parts, hashlib.sha256(images.tobytes()).hexdigest()])
    file = cache_root() / "training" / f"latents-{key}.safetensors"
    if not file.is_file():
        print(f"encoding {2 * len(images)} images", flush=True)
        model: Any = load_model(autoencoder / VAE).to(device)
        latents = torch.stack([encode(model, part) for part in (images, images[..., ::-1])])
        with atomic_file(file) as temporary:
            save_file({"latents": latents}, temporary)
    return load_file(file, device=str(device))["latents"]


@torch.no_grad()
def encode(model: Any, images: np.ndarray) -> Tensor:
    """Return the latents of uint8 images (N, 3, H, W) in float32 on the CPU."""
    device = next(model.parameters()).device
    parts = []
    for start in range(0, len(images), ENCODED_AT_ONCE):
        x = to_unit_range(np.ascontiguousarray(images[start : start + ENCODED_AT_ONCE]), device)
        latents = model.encode(x).latent_dist.mode() * model.config.scaling_factor
        parts.append(latents.cpu().contiguous())
    return torch.cat(parts)

"""The CLIP score's formula under a small CLIP of our own, a proxy for 32 x 32 images of CIFAR-10's classes.

The model is of open_clip's classes and was trained on CIFAR-10 and the embedded prompts. Its values rank images of one
task and have nothing in common with those of a published CLIP model: never print them as CLIP score.
"""

from __future__ import annotations

from pathlib import Path

import torch

from edadm.errors import EdadmError
from edadm.metrics import clip
from edadm.metrics.clip import ClipNetwork

FOLDER = Path(__file__).parents[1] / "assets" / "cifar10_clip_tiny"


def sha256() -> str:
    """Return the sha256 of the embedded weights. Raises EdadmError when they are not there."""
    return clip.find_weights(_model(), None)[1]


def load_network(device: torch.device | str = "cpu") -> ClipNetwork:
    """Load the embedded model, in float32. Raises EdadmError when it is not there."""
    return clip.load_network(_model(), None, device=device)


def _model() -> str:
    if not (FOLDER / clip.CONFIG).is_file():
        raise EdadmError(
            f"no small CLIP at {FOLDER}: train it with python -m experiments.train_tiny clip --export {FOLDER}, or "
            "choose metrics without clip_tiny"
        )
    return f"{clip.LOCAL}{FOLDER}"

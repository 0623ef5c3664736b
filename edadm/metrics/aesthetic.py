"""Aesthetic score: LAION's predictors, affine heads on the normalised image embeddings of CLIP ViT-L/14.

Two heads are in use. ``v1`` is one linear layer; ``v2`` has five layers without activations between them, so it is
one affine map as well and is kept folded. A score is about 1 to 10 and means the mean rating a picture would get. The
paper's package offers both heads and the paper does not say which it took; its default is ``v1``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edadm.errors import EdadmError
from edadm.metrics import clip
from edadm.metrics.clip import ClipNetwork
from edadm.metrics.weights import checked_sha256, read_state

ASSETS = Path(__file__).parents[1] / "assets" / "aesthetic"
HEADS = {
    "v1": ASSETS / "v1_vit_l_14_linear.safetensors",
    "v2": ASSETS / "v2_sac_logos_ava1_l14_linearMSE_folded.safetensors",
}
ENCODER = ("ViT-L-14", "openai")  # what both heads were trained on


@dataclass(frozen=True)
class Head:
    """An affine map of embeddings: float64 weight (D,) and bias; name and sha256 of its file."""

    weight: torch.Tensor
    bias: float
    name: str
    sha256: str


@dataclass(frozen=True)
class AestheticNetwork:
    """The CLIP model whose image embeddings are scored, and the head."""

    clip: ClipNetwork
    head: Head


def load_network(
    head: str | os.PathLike = "v1",
    weights: str | os.PathLike | None = None,
    sha256: str | None = None,
    device: torch.device | str = "cpu",
    have: ClipNetwork | None = None,
) -> AestheticNetwork:
    """Load a head (``load_head``) and OpenAI's CLIP ViT-L/14.

    weights, sha256: file and checksum of the CLIP model, as ``clip.load_network`` takes them. have: a CLIP model
    that is taken if it is this one. Raises EdadmError as both.
    """
    found = load_head(head)
    if have is not None and have.sha256 == clip.find_weights(*ENCODER, weights, sha256)[1]:
        return AestheticNetwork(have, found)
    return AestheticNetwork(clip.load_network(*ENCODER, weights, sha256, device), found)


def load_head(head: str | os.PathLike = "v1") -> Head:
    """Read a head: ``v1``, ``v2``, or a file with linear layers (``fold`` says in which form).

    Raises EdadmError for a file that is missing or holds something else.
    """
    path = HEADS.get(str(head), Path(head).expanduser())
    choices = f"choose {', '.join(HEADS)} or give the path of a head"
    sha256 = checked_sha256(path, None, "aesthetic head", choices)
    try:
        weight, bias = fold(read_state(path))
    except ValueError as error:
        raise EdadmError(f"{path} holds no aesthetic head ({error}): {choices}") from error
    return Head(weight, bias, str(head) if str(head) in HEADS else path.stem, sha256)


def fold(state: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, float]:
    """Return the one affine map, float64 weight (D,) and bias, that linear layers without activations between make.

    state: ``weight`` (1, D) and ``bias`` (1,), or such pairs under a prefix with a number, in whose order they follow
    (``layers.0.weight``, ``layers.2.weight``, ...). Raises ValueError for other keys and for shapes that do not chain.
    """
    layers = sorted({key.rpartition(".")[0] for key in state}, key=_numbers)
    if set(state) != {_key(layer, kind) for layer in layers for kind in ("weight", "bias")}:
        raise ValueError("it has other tensors besides the weights and biases of linear layers")
    weight = bias = torch.empty(0)
    for layer in layers:
        w, b = state[_key(layer, "weight")].double(), state[_key(layer, "bias")].double()
        follows = layer == layers[0] or (w.ndim == 2 and w.shape[1] == len(weight))
        if w.ndim != 2 or b.shape != w.shape[:1] or not follows:
            raise ValueError(
                f"layer {layer} has weight {tuple(w.shape)} and bias {tuple(b.shape)}, which do not follow"
            )
        weight, bias = (w, b) if layer == layers[0] else (w @ weight, w @ bias + b)
    if len(bias) != 1 or not (weight.isfinite().all() and bias.isfinite().all()):
        raise ValueError("it must have one output and finite values")
    return weight[0], float(bias[0])


def _numbers(layer: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", layer)]


def _key(layer: str, kind: str) -> str:
    return f"{layer}.{kind}" if layer else kind


def scores(embeddings: torch.Tensor, head: Head) -> np.ndarray:
    """Return the score of each image embedding (N, D) of length 1: float64 (N,).

    Raises EdadmError when the head was made for embeddings of another size.
    """
    if embeddings.shape[1] != len(head.weight):
        raise EdadmError(
            f"aesthetic head {head.name} takes embeddings of {len(head.weight)} numbers, the CLIP model gives "
            f"{embeddings.shape[1]}: it needs {' '.join(ENCODER)}"
        )
    return (embeddings.double() @ head.weight + head.bias).numpy()

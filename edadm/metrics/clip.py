"""CLIP score of generated images and their prompts, in the embeddings of an open_clip model.

CLIP score = 100 max(cos(image, prompt), 0), averaged over images, each with its own prompt (Hessel et al. 2021 with a
weight of 100 in place of 2.5). The paper names ViT-g/14, the released code calls ViT-L/14; values of different models
have nothing in common, so results name the model. Images go through CLIP's own transform (bicubic resize of the shorter
side with antialias, centre crop), prompts through its tokenizer, which cuts them at the context length.

A model is named as in open_clip: an architecture and a tag of published weights, or ``local-dir:FOLDER`` with
``open_clip_config.json`` and the weights in one folder, and ``bpe.txt.gz`` where it has a vocabulary of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from edadm.environment import check_torchvision
from edadm.errors import EdadmError
from edadm.metrics.frechet import full_float32
from edadm.metrics.images import check_images
from edadm.metrics.weights import checked_sha256, read_state
from edadm.tasks.ddim_checkpoint import load_state

if TYPE_CHECKING:
    from PIL import Image

LOCAL = "local-dir:"
CONFIG = "open_clip_config.json"
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
VOCABULARY = "bpe.txt.gz"  # merges, as open_clip's own file of this kind has them
BATCH = 64


@dataclass(frozen=True)
class ClipNetwork:
    """An open_clip model in evaluation mode with its transforms.

    preprocess: PIL image to float32 (3, S, S). tokenize: texts to int64 (N, context length). name: architecture and
    weights, as records state them. sha256: of the weight file.
    """

    model: Any
    preprocess: Callable[[Image.Image], torch.Tensor]
    tokenize: Callable[[list[str]], torch.Tensor]
    name: str
    sha256: str


def load_network(
    model: str = "ViT-g-14",
    pretrained: str | None = "laion2b_s12b_b42k",
    weights: str | os.PathLike | None = None,
    sha256: str | None = None,
    device: torch.device | str = "cpu",
) -> ClipNetwork:
    """Load a CLIP model, in float32.

    model, pretrained: as open_clip names them; the tag decides activation and pixel normalisation also where weights,
    the file of its state dict in open_clip's layout, is given. Without weights they are downloaded once to open_clip's
    cache, or taken from the folder of ``local-dir:``. sha256: the expected checksum, None accepts any. Raises
    EdadmError for an unknown model or tag, a failed download, another checksum, and a file that does not fit.
    """
    path, found = find_weights(model, pretrained, weights, sha256)
    from open_clip.transform import PreprocessCfg, image_transform_v2

    architecture, transform = _configuration(model, pretrained)
    network: Any = load_state(_build(architecture, model), read_state(path), str(path))
    size = network.visual.image_size
    return ClipNetwork(
        network.eval().requires_grad_(False).to(device),
        image_transform_v2(PreprocessCfg(**{**transform, "size": size}), is_train=False),
        _tokenizer(architecture["text_cfg"], model),
        name_of(model, pretrained),
        found,
    )


def name_of(model: str, pretrained: str | None) -> str:
    """Return what records call a model: architecture and tag, or the name of its folder."""
    if model.startswith(LOCAL):
        return Path(model.removeprefix(LOCAL)).expanduser().resolve().name
    return f"{model} {pretrained or 'own weights'}"


def find_weights(
    model: str, pretrained: str | None, weights: str | os.PathLike | None = None, sha256: str | None = None
) -> tuple[Path, str]:
    """Return the path and the sha256 of a model's weights, downloading them if need be; see ``load_network``."""
    check_torchvision()
    _configuration(model, pretrained)
    if weights is not None:
        path = Path(weights).expanduser()
    elif model.startswith(LOCAL):
        folder = Path(model.removeprefix(LOCAL)).expanduser()
        path = next((folder / name for name in FILES if (folder / name).is_file()), folder / FILES[0])
    else:
        path = _download(model, pretrained)
    return path, checked_sha256(path, sha256, "CLIP", _remedy(model, pretrained))


def image_embeddings(images: torch.Tensor, network: ClipNetwork) -> torch.Tensor:
    """Return the embeddings of uint8 images (N, 3, H, W): float32 (N, D) of length 1, on the CPU."""
    from PIL import Image

    check_images(images)
    parts = []
    for rows in images.split(BATCH):
        pictures = [Image.fromarray(row.permute(1, 2, 0).contiguous().numpy()) for row in rows]
        x = torch.stack([network.preprocess(picture) for picture in pictures])
        parts.append(_embed(network, network.model.encode_image, x))
    return torch.cat(parts)


def text_embeddings(prompts: Sequence[str], network: ClipNetwork) -> torch.Tensor:
    """Return the embeddings of N prompts: float32 (N, D) of length 1, on the CPU; equal prompts are embedded once."""
    different = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    tokens = network.tokenize(list(different))
    embedded = torch.cat([_embed(network, network.model.encode_text, rows) for rows in tokens.split(BATCH)])
    return embedded[[different[prompt] for prompt in prompts]]


def scores(images: torch.Tensor, prompts: torch.Tensor) -> np.ndarray:
    """Return 100 max(cos, 0) of each image embedding (N, D) and its own prompt's (N, D), of length 1: float64 (N,)."""
    return (100 * (images.double() * prompts.double()).sum(1).clamp(min=0)).numpy()


def _embed(network: ClipNetwork, encode: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    device = next(network.model.parameters()).device
    with full_float32(device):
        return nn.functional.normalize(encode(x.to(device)), dim=1).cpu()


def _configuration(model: str, pretrained: str | None) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Return the arguments of the architecture and the pixel transform, activation and normalisation as trained."""
    import open_clip
    from open_clip.transform import PreprocessCfg

    fields = PreprocessCfg.__dataclass_fields__.keys()
    if model.startswith(LOCAL):
        path = Path(model.removeprefix(LOCAL)).expanduser() / CONFIG
        try:
            given = json.loads(path.read_text(encoding="utf-8"))
            architecture, transform = given["model_cfg"], given.get("preprocess_cfg", {})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise EdadmError(
                f"no CLIP model in {path.parent}: {CONFIG} with model_cfg is not readable ({error})"
            ) from error
        return architecture, {key: value for key, value in transform.items() if key in fields}
    architecture = open_clip.get_model_config(model)
    if architecture is None:
        raise EdadmError(f"open_clip knows no model {model}: choose for example ViT-g-14, ViT-L-14, or {LOCAL}FOLDER")
    tag = open_clip.get_pretrained_cfg(model, pretrained) if pretrained else {}
    if pretrained and not tag:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise EdadmError(f"open_clip knows no weights {pretrained} of {model}: choose from {tags}")
    # OpenAI's weights were trained with another GELU than the architecture of the same name has by default
    architecture["quick_gelu"] = tag.get("quick_gelu", architecture.get("quick_gelu", False))
    return architecture, {key: value for key, value in tag.items() if key in fields}


def _build(architecture: Mapping[str, Any], model: str) -> Any:
    import open_clip

    arguments = dict(architecture)
    towers = (arguments.get("vision_cfg", {}), arguments.get("text_cfg", {}))
    if "multimodal_cfg" in arguments or any("_model_name" in key for tower in towers for key in tower):
        raise EdadmError(f"{model} has a tower of another library: choose a model whose two towers are open_clip's own")
    build = open_clip.CustomTextCLIP if arguments.pop("custom_text", False) else open_clip.CLIP
    try:
        with torch.random.fork_rng(devices=[]):  # the constructor draws weights that are then replaced
            return build(**arguments)
    except (TypeError, KeyError, ValueError, AssertionError) as error:
        raise EdadmError(f"open_clip cannot build {model} from its configuration: {error}") from error


def _tokenizer(text: Mapping[str, Any], model: str) -> Callable[[list[str]], torch.Tensor]:
    from open_clip.tokenizer import SimpleTokenizer

    if name := text.get("hf_tokenizer_name"):
        raise EdadmError(
            f"{model} reads texts with the tokenizer {name} of another library: choose one with CLIP's own"
        )
    own = Path(model.removeprefix(LOCAL)).expanduser() / VOCABULARY if model.startswith(LOCAL) else None
    vocabulary = {"bpe_path": str(own)} if own is not None and own.is_file() else {}
    tokenizer = SimpleTokenizer(context_length=text["context_length"], **vocabulary)
    if text["vocab_size"] < tokenizer.vocab_size:
        whose = "its" if vocabulary else "CLIP's"
        raise EdadmError(
            f"the text tower knows {text['vocab_size']} tokens, {whose} tokenizer has {tokenizer.vocab_size}: put the "
            f"{VOCABULARY} that the model was trained with beside {CONFIG}"
        )
    return tokenizer


def _download(model: str, pretrained: str | None) -> Path:
    import open_clip

    if not pretrained:
        raise EdadmError(f"no weights of {model}: give their file, or a tag of published ones as pretrained")
    try:
        return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(model, pretrained)))
    except (OSError, RuntimeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EdadmError(
            f"cannot download CLIP {model} {pretrained} ({reason}): {_remedy(model, pretrained)}"
        ) from error


def _remedy(model: str, pretrained: str | None) -> str:
    import open_clip

    if model.startswith(LOCAL):
        return f"put {FILES[0]} beside {CONFIG}"
    hub = str(open_clip.get_pretrained_cfg(model, pretrained).get("hf_hub", "")).strip("/") if pretrained else ""
    return f"fetch {FILES[0]} of {hub} from the hub and give its path as weights" if hub else "give the path as weights"

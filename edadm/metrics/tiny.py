"""Embedded proxies for 32 x 32 images: distances and scores in the features of a small CIFAR-10 classifier.

``fd_tiny`` is the Frechet distance of pooled features (129), ``sfd_tiny`` of spatial ones (7 channels, 4 x 4),
``is_tiny`` the Inception Score formula on the classifier's ten probabilities. They rank models of one task at equal n
and have nothing in common with FID, sFID and IS but the formulas: never print them under those names.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from edadm.errors import EdadmError
from edadm.metrics.frechet import Statistics, frechet_distance, full_float32, statistics
from edadm.metrics.images import check_images
from edadm.metrics.tiny_network import TinyResNet

VERSION = 2
ASSETS = Path(__file__).parents[1] / "assets" / "cifar10_tiny_features"
WEIGHTS = ASSETS / "features.safetensors"
REFERENCE = ASSETS / "reference.safetensors"
IMAGE_SIZE = 32
CHUNK = 250


@dataclass(frozen=True)
class TinyNetwork:
    """The classifier in evaluation mode, and the sha256 of its weight file."""

    model: TinyResNet
    sha256: str


@dataclass(frozen=True)
class TinyFeatures:
    """What one pass over N images gives, float32 on the CPU: pooled (N, 129), spatial (N, 112), logits (N, 10)."""

    pooled: torch.Tensor
    spatial: torch.Tensor
    logits: torch.Tensor

    def __len__(self) -> int:
        return len(self.pooled)


@dataclass(frozen=True)
class TinyReference:
    """Statistics of a set of images: what the proxies are measured against.

    pixel_mean, pixel_std: (3, 32, 32) float32 in [0, 255], for the per-pixel Gaussian of the sanity ladder.
    sha256: the weights of the feature network, which the images' features must come from too.
    """

    pooled: Statistics
    spatial: Statistics
    pixel_mean: np.ndarray
    pixel_std: np.ndarray
    n: int
    name: str
    sha256: str


def load_network(weights: Path | None = None, device: torch.device | str = "cpu") -> TinyNetwork:
    """Load the feature network, by default the embedded one.

    Raises EdadmError when the file is missing or does not hold this network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = weights or WEIGHTS
    if not path.is_file():
        raise EdadmError(f"no feature network at {path}: reinstall edadm, or make one with experiments/train_tiny.py")
    data = path.read_bytes()
    model = TinyResNet()
    try:
        model.load_state_dict(load(data))
    except (SafetensorError, RuntimeError) as error:
        raise EdadmError(f"{path} does not hold the feature network of the proxies: {error}") from error
    model = model.float().eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
    return TinyNetwork(model, hashlib.sha256(data).hexdigest())


def extract(images: torch.Tensor, network: TinyNetwork) -> TinyFeatures:
    """Return the features of uint8 images (N, 3, 32, 32) in one pass.

    Chunks have one fixed size, the last one padded, so that an image's features do not depend on how many others are
    scored with it. Runs in float32 without TF32 or autocast. Raises EdadmError for another image size.
    """
    check_images(images)
    if tuple(images.shape[-2:]) != (IMAGE_SIZE, IMAGE_SIZE):
        raise EdadmError(
            f"the embedded proxies take {IMAGE_SIZE} x {IMAGE_SIZE} images, got {images.shape[-1]} x "
            f"{images.shape[-2]}: use fid, sfid or kid for other sizes"
        )
    device = next(network.model.parameters()).device
    parts: list[tuple[torch.Tensor, ...]] = []
    with full_float32(device):
        for rows in images.split(CHUNK):
            x = torch.zeros(CHUNK, *images.shape[1:], device=device).contiguous(memory_format=torch.channels_last)
            x[: len(rows)] = rows.to(device).float() / 127.5 - 1
            parts.append(tuple(part[: len(rows)].cpu() for part in network.model.features(x)))
    pooled, spatial, logits = (torch.cat(part) for part in zip(*parts, strict=True))
    return TinyFeatures(pooled, spatial, logits)


def fd_tiny(features: TinyFeatures, reference: TinyReference | TinyFeatures) -> float:
    """Return the Frechet distance of pooled features to a reference or to the features of other images."""
    return _distance(features, reference, "pooled")


def sfd_tiny(features: TinyFeatures, reference: TinyReference | TinyFeatures) -> float:
    """Return the Frechet distance of spatial features to a reference or to the features of other images."""
    return _distance(features, reference, "spatial")


def is_tiny(features: TinyFeatures) -> float:
    """Return exp(mean KL(p(y|x) || p(y))) of the classifier's probabilities, over all images at once.

    One split, where the Inception Score takes ten: splits of a few hundred images would bias it further.
    """
    log_p = features.logits.double().log_softmax(1)
    p = log_p.exp()
    marginal = p.mean(0)
    return float((p * (log_p - marginal.log())).sum(1).mean().exp())


def class_shares(features: TinyFeatures) -> np.ndarray:
    """Return the share of images that the classifier assigns to each of CIFAR-10's ten classes, in their order."""
    counts = torch.bincount(features.logits.argmax(1), minlength=features.logits.shape[1])
    return (counts.double() / len(features)).numpy()


def build_reference(images: torch.Tensor, network: TinyNetwork, name: str) -> TinyReference:
    """Compute the reference statistics of uint8 images (N, 3, 32, 32), for example of a training set."""
    features = extract(images, network)
    total = images.sum(0, dtype=torch.float64)
    squares = sum(rows.double().square().sum(0) for rows in images.split(CHUNK))
    mean = total / len(images)
    deviation = (squares / len(images) - mean.square()).clamp(min=0).sqrt()
    return TinyReference(
        statistics(features.pooled), statistics(features.spatial), mean.float().numpy(), deviation.float().numpy(),
        len(images), name, network.sha256,
    )  # fmt: skip


def save_reference(reference: TinyReference, path: Path) -> None:
    """Write a reference as safetensors.

    Tensors pooled.mean, pooled.covariance, spatial.mean, spatial.covariance (float64), pixel.mean, pixel.std (float32);
    metadata n, name, sha256 (of the feature network), version.
    """
    from safetensors.numpy import save_file

    tensors = {
        "pooled.mean": reference.pooled.mean, "pooled.covariance": reference.pooled.covariance,
        "spatial.mean": reference.spatial.mean, "spatial.covariance": reference.spatial.covariance,
        "pixel.mean": reference.pixel_mean, "pixel.std": reference.pixel_std,
    }  # fmt: skip
    metadata = {"n": str(reference.n), "name": reference.name, "sha256": reference.sha256, "version": str(VERSION)}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata=metadata)


def load_reference(path: Path | None = None) -> TinyReference:
    """Read a reference that ``save_reference`` wrote, by default the embedded one of CIFAR-10's training images.

    Raises EdadmError when the file is missing or is not such a reference.
    """
    from safetensors import SafetensorError, safe_open

    path = path or REFERENCE
    if not path.is_file():
        raise EdadmError(f"no reference statistics at {path}: reinstall edadm, or write them with save_reference")
    try:
        with safe_open(path, framework="np") as file:
            meta = file.metadata() or {}
            value = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        n = int(meta["n"])
        return TinyReference(
            Statistics(value["pooled.mean"], value["pooled.covariance"], n),
            Statistics(value["spatial.mean"], value["spatial.covariance"], n),
            value["pixel.mean"], value["pixel.std"], n, meta["name"], meta["sha256"],
        )  # fmt: skip
    except (SafetensorError, KeyError, ValueError) as error:
        raise EdadmError(f"{path} is no reference of the embedded proxies ({error}): write it again") from error


def check_same_network(reference: TinyReference, network: TinyNetwork) -> None:
    """Raise EdadmError when a reference was computed with other weights than those of the network."""
    if reference.sha256 != network.sha256:
        raise EdadmError(
            f"reference {reference.name!r} was made with feature weights {reference.sha256[:8]}, the network has "
            f"{network.sha256[:8]}: build the reference again with this network"
        )


def sanity_ladder(
    held_out: torch.Tensor,
    reference: TinyReference,
    network: TinyNetwork,
    rng: np.random.Generator,
    fp_samples: torch.Tensor | None = None,
) -> dict[str, float]:
    """Return fd_tiny of ever worse images, in the order in which it must grow, all at the n of ``held_out``.

    held_out: uint8 (N, 3, 32, 32) not in the training set. fp_samples: at least N samples of the full-precision model;
    without them that rung is missing. The per-pixel Gaussian is the reference's own mean and deviation.
    """
    n = len(held_out)
    if fp_samples is not None and len(fp_samples) < n:
        raise ValueError(f"{len(fp_samples)} samples cannot be compared with {n} held-out images at equal n")
    rungs = {
        "held_out": held_out,
        "jpeg_30": jpeg(held_out, quality=30),
        "blur": blur(held_out, radius=BLUR_RADIUS),
        "fp_samples": None if fp_samples is None else fp_samples[:n],
        "pixel_gaussian": pixel_gaussian(reference, n, rng),
        "uniform_noise": torch.from_numpy(rng.integers(0, 256, tuple(held_out.shape), dtype=np.uint8)),
    }
    return {name: fd_tiny(extract(images, network), reference) for name, images in rungs.items() if images is not None}


BLUR_RADIUS = 0.6


def jpeg(images: torch.Tensor, quality: int) -> torch.Tensor:
    """Compress uint8 images (N, 3, H, W) to JPEG and back (PIL's default chroma subsampling)."""
    from PIL import Image

    def compress(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=quality)
        return Image.open(buffer)

    return _each(images, compress)


def blur(images: torch.Tensor, radius: float) -> torch.Tensor:
    """Blur uint8 images (N, 3, H, W) with a Gaussian of this standard deviation in pixels."""
    from PIL import ImageFilter

    return _each(images, lambda image: image.filter(ImageFilter.GaussianBlur(radius)))


def pixel_gaussian(reference: TinyReference, n: int, rng: np.random.Generator) -> torch.Tensor:
    """Draw n uint8 images whose pixels are independent with the mean and deviation of the reference's images."""
    shape = (n, *reference.pixel_mean.shape)
    draw = reference.pixel_mean + reference.pixel_std * rng.standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(np.clip(np.rint(draw), 0, 255).astype(np.uint8))


def _each(images: torch.Tensor, change: Callable) -> torch.Tensor:
    from PIL import Image

    changed = [np.asarray(change(Image.fromarray(x))) for x in images.permute(0, 2, 3, 1).contiguous().numpy()]
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).contiguous()


def _distance(features: TinyFeatures, reference: TinyReference | TinyFeatures, layer: str) -> float:
    other = getattr(reference, layer)
    other = other if isinstance(other, Statistics) else statistics(other)
    return frechet_distance(other, statistics(getattr(features, layer)))

"""FD-DINOv2: the Frechet distance in DINOv2 features, through torch-fidelity's extractor, with local weights.

torch-fidelity's ``dinov2-vit-*-14`` fetches network code and weights through torch.hub and takes no file. Here the same
network is built by timm and filled from the released weight file; the extractor's own preprocessing (TF1 bilinear
resize to 224 without antialias, ImageNet normalisation) and forward pass stay. Because of that resize the values are
torch-fidelity's, not those of dgm-eval (Stein et al. 2023), which resizes with antialias.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from edadm.environment import check_torchvision
from edadm.errors import EdadmError
from edadm.metrics.frechet import Moments, Statistics, frechet_distance, full_float32, statistics
from edadm.metrics.images import check_images
from edadm.metrics.references import FeatureReference, cached, holds, load_reference, open_images
from edadm.metrics.weights import checked_sha256, fetched, read_state
from edadm.store import cache_root
from edadm.tasks.ddim_checkpoint import load_state

if TYPE_CHECKING:
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

VERSION = 1
DEFAULT = "dinov2-vit-l-14"
SIDE = 224 // 14  # patches a side
BATCH = 32
_READ_WORKERS = 8


@dataclass(frozen=True)
class Release:
    """One of Meta's backbones without registers: the letter in its file name, its name in timm, its file's sha256."""

    letter: str
    timm_name: str
    sha256: str

    @property
    def url(self) -> str:
        """Where the weight file is published."""
        name = f"dinov2_vit{self.letter}14"
        return f"https://dl.fbaipublicfiles.com/dinov2/{name}/{name}_pretrain.pth"

    @property
    def path(self) -> Path:
        """Where torch's hub keeps the weight file."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.url.rsplit("/", 1)[1]


RELEASES = {
    "dinov2-vit-s-14": Release(
        "s", "vit_small_patch14_dinov2", "b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9"
    ),
    "dinov2-vit-b-14": Release(
        "b", "vit_base_patch14_dinov2", "0b8b82f85de91b424aded121c7e1dcc2b7bc6d0adeea651bf73a13307fad8c73"
    ),
    "dinov2-vit-l-14": Release(
        "l", "vit_large_patch14_dinov2", "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428"
    ),
    "dinov2-vit-g-14": Release(
        "g", "vit_giant_patch14_dinov2", "baf8467e50af277596bbbafa06887c177ee899ab46033649c383577d7e9309d3"
    ),
}


@dataclass(frozen=True)
class Dinov2Network:
    """The feature extractor, its name in torch-fidelity, and the sha256 of its weight file."""

    extractor: FeatureExtractorBase
    name: str
    sha256: str


def load_network(
    model: str = DEFAULT,
    weights: str | os.PathLike | None = None,
    sha256: str | None = None,
    device: torch.device | str = "cpu",
) -> Dinov2Network:
    """Load DINOv2 from a file in Meta's layout, or from their release, downloaded once to torch's hub folder.

    sha256: the expected checksum of the file, default that of the release. Raises EdadmError for an unknown model, a
    missing file, another checksum, a failed download, or a file that does not hold the network.
    """
    path, found = find_weights(model, weights, sha256)
    network = _build(RELEASES[model].timm_name, read_state(path), str(path))
    extractor = extractor_class()(model, network)
    return Dinov2Network(extractor.eval().requires_grad_(False).to(device), model, found)


def find_weights(
    model: str = DEFAULT, weights: str | os.PathLike | None = None, sha256: str | None = None
) -> tuple[Path, str]:
    """Return the path and the sha256 of the weights; without a path, of Meta's release, which is fetched if absent."""
    check_torchvision()
    release = release_of(model)
    remedy = f"fetch {release.url} and give its path as weights"
    if weights is not None:
        path = Path(weights).expanduser()
    else:
        path = release.path
        fetched(release.url, path, functools.partial(_download, sha256=release.sha256), "DINOv2", remedy)
    return path, checked_sha256(path, sha256 or release.sha256, "DINOv2", remedy)


def release_of(model: str) -> Release:
    """Return what is published of a model. Raises EdadmError for an unknown one."""
    if model not in RELEASES:
        raise EdadmError(f"unknown DINOv2 model {model}: choose from {', '.join(RELEASES)}")
    return RELEASES[model]


def extract(images: torch.Tensor, network: Dinov2Network) -> torch.Tensor:
    """Return the features of uint8 images (N, 3, H, W): the normalised class token, float32 (N, D), on the CPU."""
    check_images(images)
    return torch.cat([_forward(rows, network) for rows in images.split(BATCH)])


def fd_dinov2(features: torch.Tensor, reference: Statistics) -> float:
    """Return the Frechet distance of features (N, D) to reference statistics.

    Raises NotAvailable for fewer than 2 images, EdadmError for a reference of other features.
    """
    if features.shape[1] != reference.mean.size:
        raise EdadmError(f"the reference has {reference.mean.size} features, the images {features.shape[1]}")
    return frechet_distance(statistics(features), reference)


def reference_from(
    source: str | os.PathLike,
    network: Dinov2Network,
    crop: str | None = None,
    cache: Path | None = None,
    datasets_root: str | os.PathLike | None = None,
) -> FeatureReference:
    """Return the reference statistics of a source, computed once and cached under a name with its content's hash.

    source: as ``inception.reference_from``, a folder with its sub-folders; statistics must be ours and of this network.
    cache: default ``<cache root>/dinov2``. Raises EdadmError for another source.
    """
    path = Path(source).expanduser()
    if path.suffix == ".npz" and holds(path, "mu"):
        reference = load_reference(path, network.sha256)
        if reference.sha256 is None:
            raise EdadmError(f"{path} holds statistics of other features than DINOv2's: give images")
        return reference
    images = open_images(source, recursive=True, datasets_root=datasets_root, crop=crop)
    key = hashlib.sha256(f"{images.content} {network.sha256} {VERSION}".encode()).hexdigest()[:16]

    def build() -> FeatureReference:
        return dataclasses.replace(build_reference(images.images, network, images.name), protocol=crop)

    return cached((cache or cache_root() / "dinov2") / f"{images.name}-{key}.npz", network.sha256, build)


def build_reference(
    images: Sequence[torch.Tensor] | torch.Tensor, network: Dinov2Network, name: str
) -> FeatureReference:
    """Compute the statistics of uint8 images (3, H, W), held in a tensor or read one by one, in one pass."""
    workers = _READ_WORKERS if next(network.extractor.parameters()).is_cuda else 0
    moments, size = Moments(), None
    for rows in torch.utils.data.DataLoader(images, BATCH, num_workers=workers):  # type: ignore[arg-type]
        moments.add(_forward(rows, network))
        size = (rows.shape[2], rows.shape[3])
    return FeatureReference(moments.statistics(), None, None, moments.n, name, network.sha256, size=size)


@functools.cache
def extractor_class() -> type[FeatureExtractorBase]:
    """Return torch-fidelity's DINOv2 extractor with a constructor that takes the network instead of fetching it."""
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

    class LocalDinov2(FeatureExtractorDinoV2):
        def __init__(self, name: str, network: nn.Module):
            FeatureExtractorBase.__init__(self, name, ["dinov2"])
            self.feature_extractor_internal_dtype = torch.float32
            self.model = network.float()

    return LocalDinov2


def _forward(rows: torch.Tensor, network: Dinov2Network) -> torch.Tensor:
    device = next(network.extractor.parameters()).device
    with full_float32(device):
        return network.extractor(rows.to(device))[0].cpu()


def _build(timm_name: str, state: Mapping[str, torch.Tensor], source: str) -> nn.Module:
    import timm

    with torch.random.fork_rng(devices=[]):  # the constructor draws weights that are then replaced
        network = timm.create_model(timm_name, pretrained=False, num_classes=0, img_size=SIDE * 14)
    named = {_timm_key(key): tensor for key, tensor in state.items() if key != "mask_token"}
    positions = named.get("pos_embed")
    if positions is not None and positions.ndim == 3:
        named["pos_embed"] = _resized_positions(positions)
    return load_state(network, named, source)


def _timm_key(key: str) -> str:
    """Translate Meta's names of the gated layers of the largest model."""
    return key.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2.")


def _resized_positions(positions: torch.Tensor) -> torch.Tensor:
    """Resize position embeddings (1, 1 + n * n, D) to SIDE x SIDE patches as Meta's network does.

    Bicubic without antialias, with a scale of (SIDE + 0.1) / n: the offset is in the released code and moves the
    sampling points.
    """
    patches = positions[:, 1:].float()
    n = math.isqrt(patches.shape[1])
    if n == SIDE or n * n != patches.shape[1]:
        return positions
    grid = patches.reshape(1, n, n, -1).permute(0, 3, 1, 2)
    scale = (SIDE + 0.1) / n
    resized = nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    return torch.cat([positions[:, :1].float(), resized.flatten(2).mT], dim=1)


def _download(url: str, path: Path, sha256: str) -> None:
    torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)

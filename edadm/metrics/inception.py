"""FID, sFID, Inception Score, KID, precision and recall through torch-fidelity's functions on features.

One pass of torch-fidelity's Inception (TensorFlow's network of 2015, TF1 bilinear resize to 299 without antialias)
gives all features: ``2048`` for FID, KID, precision and recall (there torch-fidelity's own default is VGG16),
``logits_unbiased`` for the Inception Score, ``spatial`` for sFID.

torch-fidelity ignores misspelt keyword arguments and keys its cache by name alone; here options are checked and
cache names hold the hash of the content.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edadm.errors import EdadmError
from edadm.metrics.frechet import Moments, NotAvailable, Statistics, full_float32
from edadm.metrics.images import check_images, image_files, read_image
from edadm.metrics.inception_network import InceptionNetwork
from edadm.store import cache_root

logger = logging.getLogger(__name__)

VERSION = 1
IS_SPLITS = 10
KID_SUBSET_SIZE = 1000
NEIGHBOURS = 3
SEED = 2020  # torch-fidelity's default, for the shuffle of IS and the subsets of KID
_READ_WORKERS = 8
_LARGE = 10_000  # above this many images precision and recall are computed in parts


@dataclass(frozen=True)
class InceptionFeatures:
    """Float32 features of N images on the CPU: pooled (N, 2048), spatial (N, 2023), logits (N, 1008) without bias."""

    pooled: torch.Tensor
    spatial: torch.Tensor
    logits: torch.Tensor

    def __len__(self) -> int:
        return len(self.pooled)


@dataclass(frozen=True)
class InceptionReference:
    """What images are measured against.

    spatial is None in a foreign file without sFID statistics; features (n, 2048) is None unless they were kept for KID,
    precision and recall; n is 0 and sha256 (of the Inception weights) None in a foreign file that does not say.
    """

    pooled: Statistics
    spatial: Statistics | None
    features: torch.Tensor | None
    n: int
    name: str
    sha256: str | None


def extract(images: torch.Tensor, network: InceptionNetwork, batch: int = 64) -> InceptionFeatures:
    """Return the features of uint8 images (N, 3, H, W) in one pass, in float32 without TF32 or autocast."""
    check_images(images)
    parts = [_forward(rows, network) for rows in images.split(batch)]
    return InceptionFeatures(*(torch.cat(part) for part in zip(*parts, strict=True)))


def fid(features: InceptionFeatures, reference: InceptionReference) -> float:
    """Return the Frechet Inception Distance. Raises NotAvailable for fewer than 2 images."""
    return _distance(features.pooled, reference.pooled)


def sfid(features: InceptionFeatures, reference: InceptionReference) -> float:
    """Return the Frechet distance of the spatial features.

    Raises NotAvailable for fewer than 2 images and for a reference without spatial statistics.
    """
    if reference.spatial is None:
        raise NotAvailable(f"reference {reference.name!r} holds no spatial statistics (mu_s, sigma_s)")
    return _distance(features.spatial, reference.spatial)


def inception_score(features: InceptionFeatures) -> tuple[float, float]:
    """Return the mean and the deviation over 10 splits; the deviation is no error bar.

    Raises NotAvailable for fewer than 10 images.
    """
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if len(features) < IS_SPLITS:
        raise NotAvailable(f"the Inception Score needs an image in each of its {IS_SPLITS} splits, got {len(features)}")
    score = isc_features_to_metric(features.logits, splits=IS_SPLITS, shuffle=True, rng_seed=SEED)
    return score[KEY_METRIC_ISC_MEAN], score[KEY_METRIC_ISC_STD]


def kid(
    features: InceptionFeatures, reference: InceptionReference, subset_size: int = KID_SUBSET_SIZE
) -> tuple[float, float]:
    """Return the mean and the deviation of KID over 100 subsets (cubic kernel, unbiased).

    Raises NotAvailable when a side has fewer images than a subset (1,000 is the size that papers use).
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    _need("KID", subset_size, features, reference)
    options = fidelity_options(kid_subset_size=subset_size, rng_seed=SEED, verbose=False)
    distance = kid_features_to_metric(features.pooled, reference.features, **options)
    return distance[KEY_METRIC_KID_MEAN], distance[KEY_METRIC_KID_STD]


def precision_recall(features: InceptionFeatures, reference: InceptionReference) -> tuple[float, float]:
    """Return precision and recall (Kynkaanniemi et al. 2019) with 3 neighbours in the 2048 Inception features.

    Raises NotAvailable for fewer than 4 images on a side.
    """
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    _need("precision and recall", NEIGHBOURS + 1, features, reference)
    large = max(len(features), reference.n) > _LARGE
    options = fidelity_options(prc_neighborhood=NEIGHBOURS, save_cpu_ram=large, verbose=False)
    result = prc_features_to_metric(features.pooled, reference.features, **options)
    return result[KEY_METRIC_PRECISION], result[KEY_METRIC_RECALL]


def fidelity_options(**options: Any) -> dict[str, Any]:
    """Return options for a torch-fidelity function. Raises ValueError for a name it would silently ignore."""
    from torch_fidelity.defaults import DEFAULTS

    unknown = sorted(options.keys() - DEFAULTS.keys())
    if unknown:
        raise ValueError(f"torch-fidelity knows no option {', '.join(unknown)}")
    return options


def reference_from(
    source: str | os.PathLike,
    network: InceptionNetwork,
    keep_features: bool = False,
    recursive: bool = False,
    cache: Path | None = None,
    datasets_root: str | os.PathLike | None = None,
) -> InceptionReference:
    """Return the reference statistics of a source, computed once and cached under a name with its content's hash.

    source: a ``.npz`` file (``load_reference``), a name registered in torch-fidelity such as ``cifar10-train``
    (``datasets_root``: where torchvision finds or puts the files, checking them), or a folder of images (``recursive``:
    with its sub-folders). keep_features: keep the 2048 features of every image, which KID, precision and recall need.
    cache: default ``<cache root>/inception``. Raises EdadmError for a source that is none of these.
    """
    if str(source).endswith(".npz"):
        return load_reference(Path(source), network)
    images, name, content = _open(source, recursive, datasets_root)
    key = hashlib.sha256(f"{content} {network.sha256} {VERSION} {keep_features}".encode()).hexdigest()[:16]
    path = (cache or cache_root() / "inception") / f"{name}-{key}.npz"
    if path.is_file():
        try:
            return load_reference(path, network)
        except EdadmError as error:
            logger.warning("%s; it is built again", error)
    reference = build_reference(images, network, name, keep_features)
    save_reference(reference, path)
    return reference


def build_reference(
    images: Sequence[torch.Tensor] | torch.Tensor,
    network: InceptionNetwork,
    name: str,
    keep_features: bool = False,
    batch: int = 64,
) -> InceptionReference:
    """Compute the statistics of uint8 images (3, H, W), held in a tensor or read one by one, in one pass.

    Memory does not grow with their number unless ``keep_features``. Raises NotAvailable for fewer than 2 images.
    """
    workers = _READ_WORKERS if next(network.extractor.parameters()).is_cuda else 0
    pooled, spatial, kept = Moments(), Moments(), []
    for rows in torch.utils.data.DataLoader(images, batch, num_workers=workers):  # type: ignore[arg-type]
        features, positions, _ = _forward(rows, network)
        pooled.add(features)
        spatial.add(positions)
        if keep_features:
            kept.append(features)
    return InceptionReference(
        pooled.statistics(), spatial.statistics(), torch.cat(kept) if kept else None, pooled.n, name, network.sha256
    )


def save_reference(reference: InceptionReference, path: Path) -> None:
    """Write a reference as npz with the fields that ``load_reference`` lists. Raises EdadmError when it cannot."""
    fields: dict[str, Any] = {"mu": reference.pooled.mean, "sigma": reference.pooled.covariance, "n": reference.n}
    fields["name"] = reference.name
    if reference.spatial is not None:
        fields.update(mu_s=reference.spatial.mean, sigma_s=reference.spatial.covariance)
    if reference.features is not None:
        fields["features"] = reference.features.numpy()
    if reference.sha256 is not None:
        fields["weights_sha256"] = reference.sha256
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            np.savez(file, **fields)
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise EdadmError(f"cannot write {path}: {error}. Free space or choose another folder.") from error


def load_reference(path: str | os.PathLike, network: InceptionNetwork | None = None) -> InceptionReference:
    """Read reference statistics from a npz file.

    Fields: ``mu`` (2048,), ``sigma`` (2048, 2048); optional ``mu_s`` (2023,), ``sigma_s``, ``features`` (n, 2048),
    ``n``, ``name``, ``weights_sha256``. The first four are those of ADM's reference batches, the first two those of
    pytorch-fid. Raises EdadmError for an unreadable file and for one made with other weights than the network's.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            value = {key: file[key] for key in _FIELDS if key in file}
        pooled = _gaussian(value, "mu", "sigma")
        spatial = _gaussian(value, "mu_s", "sigma_s") if "mu_s" in value else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise EdadmError(f"cannot read reference statistics from {path}: {error}. Expected mu and sigma.") from error
    sha256 = str(value["weights_sha256"]) if "weights_sha256" in value else None
    if sha256 is None:
        logger.warning("%s does not say with which Inception weights it was made", path)
    elif network is not None and sha256 != network.sha256:
        raise EdadmError(
            f"{path} was made with Inception weights {sha256[:8]}, these are {network.sha256[:8]}: build it again"
        )
    features = torch.from_numpy(value["features"]).float() if "features" in value else None
    return InceptionReference(pooled, spatial, features, pooled.n, str(value.get("name", path.stem)), sha256)


_FIELDS = ("mu", "sigma", "mu_s", "sigma_s", "features", "n", "name", "weights_sha256")


def _gaussian(value: dict[str, np.ndarray], mean: str, covariance: str) -> Statistics:
    mu, sigma = value[mean].astype(np.float64), value[covariance].astype(np.float64)
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
        raise ValueError(f"{mean} {mu.shape} and {covariance} {sigma.shape} are no Gaussian")
    return Statistics(mu, sigma, int(value.get("n", 0)))


def _forward(rows: torch.Tensor, network: InceptionNetwork) -> tuple[torch.Tensor, ...]:
    device = next(network.extractor.parameters()).device
    with full_float32(device):
        return tuple(part.cpu() for part in network.extractor(rows.to(device)))


def _distance(features: torch.Tensor, reference: Statistics) -> float:
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    if len(features) < 2:
        raise NotAvailable(f"a Frechet distance needs at least 2 images, got {len(features)}")
    if features.shape[1] != reference.mean.size:
        raise EdadmError(f"the reference has {reference.mean.size} features, the images {features.shape[1]}")
    found = fid_features_to_statistics(features.double())
    expected = {"mu": reference.mean, "sigma": reference.covariance}
    return fid_statistics_to_metric(found, expected, verbose=False)[KEY_METRIC_FID]


def _need(metric: str, least: int, features: InceptionFeatures, reference: InceptionReference) -> None:
    if reference.features is None:
        raise NotAvailable(f"{metric} needs the features of the reference images: build it with keep_features=True")
    n, real = len(features), len(reference.features)
    if min(n, real) < least:
        raise NotAvailable(f"{metric} needs at least {least} images on both sides, got {n} and {real} in the reference")


class _Files(torch.utils.data.Dataset):
    """The images of a folder, read one by one; all must have one size."""

    def __init__(self, files: list[Path]):
        self.files, self.shape = files, read_image(files[0]).shape

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor:
        image = read_image(self.files[i])
        if image.shape != self.shape:
            raise EdadmError(
                f"{self.files[i]} has shape {tuple(image.shape)}, {self.files[0].name} {tuple(self.shape)}: "
                "all images of a reference must have one size"
            )
        return image


def _open(source: str | os.PathLike, recursive: bool, datasets_root: str | os.PathLike | None) -> tuple[Any, str, str]:
    """Return the images of a reference source, its name, and a text that identifies their content."""
    from torch_fidelity.registry import DATASETS_REGISTRY

    folder = Path(source)
    if str(source) in DATASETS_REGISTRY:
        root = Path(datasets_root or cache_root() / "datasets")
        try:
            root.mkdir(parents=True, exist_ok=True)
            images = DATASETS_REGISTRY[str(source)](str(root), datasets_root is None)
        except (OSError, RuntimeError) as error:
            raise EdadmError(f"no data set {source} in {root}: {error}. Put its files there.") from error
        return images, str(source), str(source)  # torchvision checks the files' md5: the name is the content
    if not folder.is_dir():
        raise EdadmError(
            f"no reference at {source}: give a folder of images, a .npz file, or one of {', '.join(DATASETS_REGISTRY)}"
        )
    files = image_files(folder, recursive)
    content = hashlib.sha256()
    for file in files:
        content.update(f"{file.relative_to(folder)} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return _Files(files), folder.resolve().name, content.hexdigest()

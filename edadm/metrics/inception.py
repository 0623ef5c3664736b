"""FID, sFID, Inception Score, KID, precision and recall through torch-fidelity's functions on features.

One pass of torch-fidelity's Inception (TensorFlow's network of 2015, TF1 bilinear resize to 299 without antialias)
gives all features: ``2048`` for FID, KID, precision and recall (there torch-fidelity's own default is VGG16),
``logits_unbiased`` for the Inception Score, ``spatial`` for sFID.

torch-fidelity ignores misspelt keyword arguments and keys its cache by name alone; here options are checked and
cache names hold the hash of the content.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edadm.errors import EdadmError
from edadm.metrics import references
from edadm.metrics.bootstrap import frechet_infinity
from edadm.metrics.frechet import Moments, NotAvailable, Statistics, full_float32
from edadm.metrics.images import check_images
from edadm.metrics.inception_network import InceptionNetwork
from edadm.metrics.references import FeatureReference as InceptionReference
from edadm.metrics.references import ReferenceImages, cached, holds, open_images
from edadm.metrics.references import save_reference as save_reference
from edadm.store import cache_root

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


def extract(images: torch.Tensor, network: InceptionNetwork, batch: int = 64) -> InceptionFeatures:
    """Return the features of uint8 images (N, 3, H, W) in one pass, in float32 without TF32 or autocast."""
    check_images(images)
    parts = [_forward(rows, network) for rows in images.split(batch)]
    return InceptionFeatures(*(torch.cat(part) for part in zip(*parts, strict=True)))


def fid(features: InceptionFeatures, reference: InceptionReference) -> float:
    """Return the Frechet Inception Distance. Raises NotAvailable for fewer than 2 images."""
    return _distance(features.pooled, reference.pooled)


def fid_infinity(
    features: InceptionFeatures,
    reference: InceptionReference,
    rng: np.random.Generator,
    device: torch.device | str = "cpu",
) -> float:
    """Return the FID extrapolated to infinitely many images, from one subset a size as Chong & Forsyth (2020).

    Raises NotAvailable for fewer than 4,098 images, twice as many as its features and two more.
    """
    return frechet_infinity(features.pooled, reference.pooled, rng, subsets=1, device=device)


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
    crop: str | None = None,
) -> InceptionReference:
    """Return the reference statistics of a source, computed once and cached under a name with its content's hash.

    source: a ``.npz`` file of statistics (``load_reference``) or of images (``arr_0``, as ADM's), a name registered in
    torch-fidelity such as ``cifar10-train`` (``datasets_root``: where torchvision finds or puts the files, checking
    them), or a folder of images (``recursive``: with its sub-folders). keep_features: keep the 2048 features of every
    image, which KID, precision and recall need; beside ADM's statistics those of ``arr_0``. crop: a name of
    ``crops.CROPS`` for images, nothing for statistics. cache: default ``<cache root>/inception``. Raises EdadmError for
    a source that is none of these.
    """
    path, folder = Path(source).expanduser(), cache or cache_root() / "inception"
    if path.suffix == ".npz" and holds(path, "mu"):
        reference = load_reference(path, network)
        if keep_features and reference.features is None and holds(path, "arr_0"):
            batch = _statistics_of(open_images(path, crop=crop), network, True, folder)
            return dataclasses.replace(reference, features=batch.features)
        return reference
    return _statistics_of(open_images(source, recursive, datasets_root, crop), network, keep_features, folder)


def _statistics_of(
    source: ReferenceImages, network: InceptionNetwork, keep_features: bool, folder: Path
) -> InceptionReference:
    key = hashlib.sha256(f"{source.content} {network.sha256} {VERSION} {keep_features}".encode()).hexdigest()[:16]

    def build() -> InceptionReference:
        reference = build_reference(source.images, network, source.name, keep_features)
        return dataclasses.replace(reference, protocol=source.protocol)

    return cached(folder / f"{source.name}-{key}.npz", network.sha256, build)


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
    size = None
    for rows in torch.utils.data.DataLoader(images, batch, num_workers=workers):  # type: ignore[arg-type]
        features, positions, _ = _forward(rows, network)
        pooled.add(features)
        spatial.add(positions)
        if keep_features:
            kept.append(features)
        size = (rows.shape[2], rows.shape[3])
    return InceptionReference(
        pooled.statistics(), spatial.statistics(), torch.cat(kept) if kept else None, pooled.n, name, network.sha256,
        size=size,
    )  # fmt: skip


def load_reference(path: str | os.PathLike, network: InceptionNetwork | None = None) -> InceptionReference:
    """Read reference statistics from a npz file, ours, ADM's or pytorch-fid's (``references.load_reference``).

    Raises EdadmError for an unreadable file and for one made with other weights than the network's.
    """
    return references.load_reference(path, network.sha256 if network is not None else None)


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

"""Reference images and the statistics of their features: where they come from, how they are cropped, what is kept.

A reference is a folder of images (with its sub-folders), a npz file, or a data set that torch-fidelity knows. The npz
files of ADM's evaluation suite hold statistics, their spatial features in another order than ours, and usually images
(``arr_0``); those of pytorch-fid hold ``mu`` and ``sigma`` only. How a reference was made is its protocol.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edadm.errors import EdadmError
from edadm.metrics import crops
from edadm.metrics.crops import CROPS, check_crop
from edadm.metrics.frechet import Statistics
from edadm.metrics.images import image_files, image_size, read_image
from edadm.store import cache_root, content_hash, file_sha256, write_atomically

logger = logging.getLogger(__name__)

ADM = "statistics of ADM's evaluation suite"
FOREIGN = "statistics of another program"
_SIZES = {"cifar10": (32, 32), "cifar100": (32, 32), "stl10": (96, 96)}  # of the data sets that torch-fidelity knows
SPATIAL_CHANNELS, SPATIAL_SIDE = 7, 17  # of Inception's spatial features, for the order of ADM's


@dataclass(frozen=True)
class FeatureReference:
    """What images are measured against: the statistics of the features of real ones.

    spatial is None for features that have none and in a foreign file without sFID statistics; features (n, D) is None
    unless they were kept for KID, precision and recall; n is 0 and sha256 (of the feature network's weights) None in a
    foreign file that does not say. protocol: the crop of ``crops`` that the images went through or, for a foreign file,
    whose statistics they are; None for images as they are. size: height and width of the images, None where unknown.
    """

    pooled: Statistics
    spatial: Statistics | None
    features: torch.Tensor | None
    n: int
    name: str
    sha256: str | None
    protocol: str | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class ReferenceImages:
    """Real images: a sequence of uint8 (3, H, W), their name, and a text that identifies their content and crop."""

    images: Sequence[torch.Tensor] | torch.Tensor
    name: str
    content: str
    protocol: str | None = None


def open_images(
    source: str | os.PathLike,
    recursive: bool = False,
    datasets_root: str | os.PathLike | None = None,
    crop: str | None = None,
) -> ReferenceImages:
    """Open a folder of images, the images of a npz file, or a data set registered in torch-fidelity.

    recursive: with the folder's sub-folders. datasets_root: where torchvision finds or puts a data set's files, and
    checks them. crop: a name of ``crops.CROPS``. Raises EdadmError for a source that is none of these or has no images.
    """
    check_crop(crop)
    images, name, content = _open(source, recursive, datasets_root, one_size=crop is None)
    if crop is not None:
        images, content = _Cropped(images, crop), f"{content} {crop}"
    return ReferenceImages(images, name, content, crop)


def content_of(source: str | os.PathLike, crop: str | None = None) -> str:
    """Return what identifies a reference's content in a key: a hash of its files, or the name of a data set.

    A folder's files are read once; as long as names, sizes and times of change stay, the result is remembered. Raises
    EdadmError for a source that is none of those of ``open_images``, and for a folder with fewer than 2 images or,
    without a crop, with images of several sizes.
    """
    check_crop(crop)
    path = Path(source).expanduser()
    if path.is_file():
        return file_sha256(path)
    if not path.is_dir():
        _check_registered(source)
        return str(source)
    files = image_files(path, recursive=True)
    if len(files) < 2:
        raise EdadmError(
            f"{path} has {len(files)} image: the statistics of a reference need at least 2, better thousands"
        )
    return _folder_content(path, files, one_size=crop is None)


def check(source: str | os.PathLike, crop: str | None, size: tuple[int, int], features: int | None = None) -> None:
    """Raise EdadmError when scored images of this height and width cannot be compared with a reference.

    crop: what reference images go through. features: their number in the scored images' features, None if it is not
    known. Warns of a reference of fewer images than features. No image is decoded.
    """
    path = Path(source).expanduser()
    found = _SIZES.get(str(source).partition("-")[0])
    count = None
    if path.is_dir():
        files = image_files(path, recursive=True)
        found, count = image_size(files[0])[1:], len(files)
    elif path.is_file():
        found, count = _of_npz(path, features)
    if found is not None and crop is None and found != size:
        raise EdadmError(
            f"the images of reference {source} are {found[1]} x {found[0]}, the scored ones {size[1]} x {size[0]}: "
            f"give a reference of this size, or set metrics.crop ({', '.join(CROPS)}) for both"
        )
    if count is not None and features is not None and count < features:
        logger.warning(
            "reference %s has %d images, fewer than the %d features compared: a trial, comparable with nothing",
            source, count, features,
        )  # fmt: skip


def _of_npz(path: Path, features: int | None) -> tuple[tuple[int, int] | None, int | None]:
    """Return the size of the images of a npz file and their number, None where it does not say."""
    if holds(path, "mu"):
        reference = load_reference(path)
        width = reference.pooled.mean.size
        if features is not None and width != features:
            raise EdadmError(f"{path} has statistics of {width} features, the images have {features}: another network")
        return reference.size, reference.n or None
    images = _npz_images(path)
    return (images.shape[2], images.shape[3]), len(images)


def cached(path: Path, sha256: str, build: Callable[[], FeatureReference]) -> FeatureReference:
    """Return the statistics kept in a file for weights with this sha256, or build and keep them."""
    if path.is_file():
        try:
            return load_reference(path, sha256)
        except EdadmError as error:
            logger.warning("%s; it is built again", error)
    reference = build()
    save_reference(reference, path)
    return reference


def save_reference(reference: FeatureReference, path: Path) -> None:
    """Write a reference as npz with the fields that ``load_reference`` lists. Raises EdadmError when it cannot."""
    fields: dict[str, Any] = {"mu": reference.pooled.mean, "sigma": reference.pooled.covariance, "n": reference.n}
    fields["name"] = reference.name
    if reference.spatial is not None:
        fields.update(mu_s=reference.spatial.mean, sigma_s=reference.spatial.covariance)
    if reference.features is not None:
        fields["features"] = reference.features.numpy()
    if reference.sha256 is not None:
        fields["weights_sha256"] = reference.sha256
    if reference.protocol is not None:
        fields["protocol"] = reference.protocol
    if reference.size is not None:
        fields["size"] = reference.size
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


def load_reference(path: str | os.PathLike, sha256: str | None = None) -> FeatureReference:
    """Read reference statistics from a npz file.

    Fields: ``mu`` (D,), ``sigma`` (D, D); optional ``mu_s`` (2023,), ``sigma_s``, ``features`` (n, D), ``n``, ``name``,
    ``weights_sha256``, ``protocol``, ``size``. A file of ADM's has the first four and neither n nor name; its spatial
    features are put into our order. sha256: of the weights that the images' features come from. Raises EdadmError for
    an unreadable file and for one made with other weights.
    """
    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            value = {key: file[key] for key in _FIELDS if key in file}
        pooled = _gaussian(value, "mu", "sigma")
        spatial = _gaussian(value, "mu_s", "sigma_s") if "mu_s" in value else None
        if spatial is not None and "name" not in value:
            spatial = _in_our_order(spatial)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise EdadmError(f"cannot read reference statistics from {path}: {error}. Expected mu and sigma.") from error
    found = str(value["weights_sha256"]) if "weights_sha256" in value else None
    if found is None:
        logger.warning("%s does not say with which weights it was made", path)
    elif sha256 is not None and found != sha256:
        raise EdadmError(f"{path} was made with weights {found[:8]}, these are {sha256[:8]}: build it again")
    features = torch.from_numpy(value["features"]).float() if "features" in value else None
    size = (int(value["size"][0]), int(value["size"][1])) if "size" in value else None
    name = str(value.get("name", path.stem))
    return FeatureReference(pooled, spatial, features, pooled.n, name, found, _protocol(value), size)


def holds(path: Path, field: str) -> bool:
    """Say whether a npz file has a field. Raises EdadmError when it cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return field in file
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise EdadmError(f"cannot read reference statistics from {path}: {error}. Expected mu and sigma.") from error


_FIELDS = ("mu", "sigma", "mu_s", "sigma_s", "features", "n", "name", "weights_sha256", "protocol", "size")


def _protocol(value: dict[str, np.ndarray]) -> str | None:
    if "name" in value:
        return str(value["protocol"]) if "protocol" in value else None
    return ADM if "mu_s" in value else FOREIGN


def _in_our_order(spatial: Statistics) -> Statistics:
    """Turn features counted as (row, column, channel), TensorFlow's order, into (channel, row, column)."""
    theirs = np.arange(spatial.mean.size).reshape(SPATIAL_SIDE, SPATIAL_SIDE, SPATIAL_CHANNELS)
    order = theirs.transpose(2, 0, 1).ravel()
    return Statistics(spatial.mean[order], spatial.covariance[np.ix_(order, order)], spatial.n)


def _gaussian(value: dict[str, np.ndarray], mean: str, covariance: str) -> Statistics:
    mu, sigma = value[mean].astype(np.float64), value[covariance].astype(np.float64)
    if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
        raise ValueError(f"{mean} {mu.shape} and {covariance} {sigma.shape} are no Gaussian")
    return Statistics(mu, sigma, int(value.get("n", 0)))


class _Files(torch.utils.data.Dataset):
    """The images of a folder, read one by one."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor:
        return read_image(self.files[i])


class _Cropped(torch.utils.data.Dataset):
    """Images cropped and resized as they are read."""

    def __init__(self, images: Sequence[torch.Tensor] | torch.Tensor, name: str):
        self.images, self.name = images, name

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> torch.Tensor:
        return crops.crop(self.images[i], self.name)


def _open(
    source: str | os.PathLike, recursive: bool, datasets_root: str | os.PathLike | None, one_size: bool
) -> tuple[Any, str, str]:
    """Return the images of a reference source, its name, and a text that identifies their content."""
    path = Path(source).expanduser()
    if path.suffix == ".npz":
        return _npz_images(path), path.stem, file_sha256(path)
    if path.is_dir():
        files = image_files(path, recursive)
        return _Files(files), path.resolve().name, _folder_content(path, files, one_size)
    _check_registered(source)
    from torch_fidelity.registry import DATASETS_REGISTRY

    root = Path(datasets_root or cache_root() / "datasets")
    try:
        root.mkdir(parents=True, exist_ok=True)
        images = DATASETS_REGISTRY[str(source)](str(root), datasets_root is None)
    except (OSError, RuntimeError) as error:
        raise EdadmError(f"no data set {source} in {root}: {error}. Put its files there.") from error
    return images, str(source), str(source)  # torchvision checks the files' md5: the name is the content


def _npz_images(path: Path) -> torch.Tensor:
    """Return the images of a sample or reference batch of ADM's: uint8 (N, 3, H, W)."""
    if not holds(path, "arr_0"):
        raise EdadmError(f"{path} holds neither statistics (mu, sigma) nor images (arr_0)")
    with np.load(path, allow_pickle=False) as file:
        images = file["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) < 2:
        raise EdadmError(f"arr_0 of {path} is {images.dtype} {images.shape}: expected uint8 images (N, H, W, 3), N > 1")
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _folder_content(folder: Path, files: list[Path], one_size: bool) -> str:
    """Return a hash of the names and the content of a folder's files, remembered as long as no file changes.

    one_size: raise EdadmError naming the first file of another size than that of the first one.
    """
    listing = [[str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    memory = cache_root() / "references" / f"{content_hash([str(folder.resolve()), listing])}.json"
    try:
        facts = json.loads(memory.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        facts = {"folder": str(folder), "content": _content(folder, files), "unequal": _unequal(files)}
        write_atomically(memory, json.dumps(facts))
    if one_size and facts["unequal"]:
        raise EdadmError(
            f"{facts['unequal']}: all images of a reference must have one size; metrics.crop ({', '.join(CROPS)}) "
            "makes them so"
        )
    return str(facts["content"])


def _content(folder: Path, files: list[Path]) -> str:
    content = hashlib.sha256()
    for file in files:
        content.update(f"{file.relative_to(folder)} {file_sha256(file)}\n".encode())
    return content.hexdigest()


def _unequal(files: list[Path]) -> str | None:
    """Say which file is the first of another size than the first one, from the files' headers."""
    sizes = ((file, image_size(file)) for file in files)
    first = image_size(files[0])
    return next((f"{file} has shape {size}, {files[0].name} {first}" for file, size in sizes if size != first), None)


def _check_registered(source: str | os.PathLike) -> None:
    from torch_fidelity.registry import DATASETS_REGISTRY

    if str(source) not in DATASETS_REGISTRY:
        raise EdadmError(
            f"no reference at {source}: give a folder of images, a .npz file, or one of {', '.join(DATASETS_REGISTRY)}"
        )

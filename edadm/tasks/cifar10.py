"""CIFAR-10 from an image folder, the original python batches, or torchvision's download.

``EDADM_CIFAR10`` names the folder. Its images may be the original ones or the JPEG copy the embedded task was
trained on; statistics of one must never be compared with images of the other.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from edadm.environment import check_torchvision
from edadm.errors import EdadmError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def load_cifar10(split: str, root: str | os.PathLike | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return (images, labels) of one split: uint8 (N, 3, 32, 32) and int64 (N,), in a fixed order.

    split: "train" or "test". root: default ``EDADM_CIFAR10``; without it torchvision downloads the original set.
    Raises EdadmError when the folder holds neither layout.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    root = root or os.environ.get("EDADM_CIFAR10")
    if root is None:
        from edadm.store import cache_root

        return _read_batches(cache_root() / "cifar10", split, download=True)
    root = Path(root)
    if (root / split).is_dir():
        return _read_folder(root / split)
    if root.name == "cifar-10-batches-py":
        root = root.parent
    if (root / "cifar-10-batches-py").is_dir():
        return _read_batches(root, split, download=False)
    raise EdadmError(
        f"no CIFAR-10 in {root}: expected {split}/<class>/*.jpg or cifar-10-batches-py/. "
        "Set EDADM_CIFAR10 to such a folder, or unset it to download the original set with torchvision."
    )


def _read_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    images, labels = [], []
    for label, name in enumerate(CLASSES):
        files = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
        for file in files:
            with Image.open(file) as image:
                images.append(np.asarray(image.convert("RGB")))
        labels += [label] * len(files)
    return np.stack(images).transpose(0, 3, 1, 2).copy(), np.asarray(labels)


def _read_batches(root: Path, split: str, download: bool) -> tuple[np.ndarray, np.ndarray]:
    check_torchvision()
    from torchvision.datasets import CIFAR10  # verifies the files' checksums before it unpickles them

    data = CIFAR10(str(root), train=split == "train", download=download)
    return data.data.transpose(0, 3, 1, 2).copy(), np.asarray(data.targets)

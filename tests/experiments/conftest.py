from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edadm.tasks.cifar10 import CLASSES


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two made-up images of every class in each split."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split in ("train", "test"):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for number in range(2):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture
def data(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The images as CIFAR-10, and a folder for what a test makes."""
    monkeypatch.setenv("EDADM_CIFAR10", str(images))
    monkeypatch.setenv("EDADM_CACHE", str(tmp_path / "cache"))
    return tmp_path

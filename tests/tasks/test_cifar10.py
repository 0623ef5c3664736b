from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from edadm.errors import EdadmError
from edadm.tasks.cifar10 import CLASSES, load_cifar10


@pytest.fixture
def folder(tmp_path):
    """Two images a class whose red channel holds the label and whose green channel the number."""
    for label, name in enumerate(CLASSES):
        place = tmp_path / "train" / name
        place.mkdir(parents=True)
        for number in (1, 0):
            pixels = np.zeros((32, 32, 3), np.uint8)
            pixels[..., 0], pixels[..., 1] = label, number
            Image.fromarray(pixels).save(place / f"{number:04d}.png")
    return tmp_path


def test_folder_is_read_in_class_and_file_order(folder):
    images, labels = load_cifar10("train", folder)
    assert images.shape == (20, 3, 32, 32) and images.dtype == np.uint8
    assert labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert images[:, 0, 0, 0].tolist() == labels.tolist()
    assert images[:, 1, 0, 0].tolist() == [0, 1] * 10


def test_environment_names_the_folder(folder, monkeypatch):
    monkeypatch.setenv("EDADM_CIFAR10", str(folder))
    assert len(load_cifar10("train")[0]) == 20


def test_neither_layout_is_an_error(tmp_path):
    with pytest.raises(EdadmError, match="no CIFAR-10 in"):
        load_cifar10("train", tmp_path)


def test_unknown_split_is_an_error(folder):
    with pytest.raises(ValueError, match="validation"):
        load_cifar10("validation", folder)

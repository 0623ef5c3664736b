from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edadm.errors import EdadmError
from edadm.metrics.crops import CROPS, crop, crop_all, resize_then_crop, square_then_resize

from .conftest import random_images


def pixels(height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (3, height, width), dtype=np.uint8))


@pytest.mark.parametrize("name", ["center_256", "adm_256", "center_300"])
def test_an_image_of_the_size_is_left_alone(name):
    size = int(name.partition("_")[2])
    image = pixels(size, size)
    assert torch.equal(crop(image, name), image)


@pytest.mark.parametrize(("height", "width", "top", "left"), [(300, 311, 0, 5), (305, 300, 2, 0), (300, 301, 0, 0)])
def test_the_centre_square_starts_at_half_the_excess_rounded_down(height, width, top, left):
    image = pixels(height, width)
    assert torch.equal(crop(image, "center_300"), image[:, top : top + 300, left : left + 300])


def test_adm_crops_after_the_resize_and_the_others_before():
    image = pixels(256, 300)
    assert torch.equal(crop(image, "adm_256"), image[:, :, 22:278])
    wide = pixels(400, 600)
    picture = Image.fromarray(wide.permute(1, 2, 0).numpy())
    small = np.asarray(picture.resize((384, 256), Image.Resampling.BICUBIC))[:, 64:320]
    assert np.array_equal(crop(wide, "adm_256").permute(1, 2, 0), small)
    square = np.asarray(picture.crop((100, 0, 500, 400)).resize((256, 256), Image.Resampling.BICUBIC))
    assert np.array_equal(crop(wide, "center_256").permute(1, 2, 0), square)
    assert not np.array_equal(small, square)


def test_adm_halves_with_a_box_filter_first():
    image = pixels(1024, 1024)
    twice = image.permute(1, 2, 0).numpy()
    for _ in range(2):  # PIL takes the mean of columns, then of rows, each rounded half up
        columns = (twice[:, ::2].astype(int) + twice[:, 1::2] + 1) // 2
        twice = (columns[::2] + columns[1::2] + 1) // 2
    assert np.array_equal(crop(image, "adm_256").permute(1, 2, 0), twice)


@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 40))
def test_any_image_comes_out_square(width, height, size):
    image = Image.new("RGB", (width, height), (10, 20, 30))
    for rule in (square_then_resize, resize_then_crop):
        found = rule(image, size)
        assert found.size == (size, size)
        assert np.array_equal(np.unique(np.asarray(found).reshape(-1, 3), axis=0), [[10, 20, 30]])


def test_stacks_are_cropped_image_by_image():
    images = random_images(3, 310)
    assert torch.equal(crop_all(images, "center_300")[2], crop(images[2], "center_300"))
    assert crop_all(images, None) is images
    with pytest.raises(EdadmError, match=f"unknown crop center_257: choose from {', '.join(CROPS)}"):
        crop_all(images, "center_257")

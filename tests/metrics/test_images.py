from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edadm.errors import EdadmError
from edadm.metrics.images import (
    comparison_grid,
    each_image,
    grid,
    image_files,
    read_file,
    read_folder,
    read_image,
    write_folder,
    writing_file,
)
from edadm.store import is_disk_full

from .conftest import random_images


def test_a_folder_survives_a_round_trip_in_order(tmp_path):
    images = random_images(12, 9)
    write_folder(images[:7], tmp_path)
    files = write_folder(images[7:], tmp_path, start=7)
    assert files[0].name == "000007.png"
    assert torch.equal(read_folder(tmp_path), images)
    assert torch.equal(read_folder(tmp_path, limit=5), images[:5])
    assert len(list(tmp_path.iterdir())) == 12  # nothing temporary is left


def test_grey_and_transparent_images_become_rgb(tmp_path):
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray(np.full((4, 4, 4), 9, np.uint8), "RGBA").save(tmp_path / "rgba.png")
    assert read_folder(tmp_path)[:, :, 0, 0].tolist() == [[7, 7, 7], [9, 9, 9]]


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_a_broken_file_is_named(tmp_path, content):
    write_folder(random_images(2, 8), tmp_path)
    if content is None:  # cut short
        content = (tmp_path / "000000.png").read_bytes()[:-40]
    (tmp_path / "000001.png").write_bytes(content)
    with pytest.raises(EdadmError, match=r"000001\.png"):
        read_folder(tmp_path)


def test_sixteen_bit_images_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 70, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(EdadmError, match="8 bits"):
        read_image(tmp_path / "deep.png")


def test_differing_sizes_are_refused(tmp_path):
    write_folder(random_images(1, 8), tmp_path)
    write_folder(random_images(1, 9), tmp_path, start=1)
    with pytest.raises(EdadmError, match=r"000001\.png is 9 x 9 but 000000\.png is 8 x 8"):
        read_folder(tmp_path)


def test_no_images_is_an_error_that_mentions_subfolders(tmp_path):
    with pytest.raises(EdadmError, match="no image folder"):
        image_files(tmp_path / "missing")
    with pytest.raises(EdadmError, match="no images in"):
        image_files(tmp_path)
    write_folder(random_images(1, 8), tmp_path / "cat")
    with pytest.raises(EdadmError, match="recursive"):
        image_files(tmp_path)
    assert len(image_files(tmp_path, recursive=True)) == 1


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EdadmError, match="cannot write"):
        write_folder(random_images(1, 8), tmp_path / "file")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is the disk that is always full")
def test_a_full_disk_is_named_while_images_are_written(tmp_path, monkeypatch):
    @contextmanager
    def full(path):
        yield Path("/dev/full")

    monkeypatch.setattr("edadm.metrics.images.atomic_file", full)
    with pytest.raises(OSError) as found, writing_file(tmp_path / "images.npy", 64) as append:
        append(torch.zeros(64, 3, 64, 64, dtype=torch.uint8))
    assert is_disk_full(found.value)


def test_a_full_disk_leaves_no_partial_file(tmp_path, monkeypatch):
    def full(self, path, format):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(EdadmError, match="No space left"):
        write_folder(random_images(1, 8), tmp_path)
    assert not list(tmp_path.iterdir())


def test_comparison_grid_has_full_precision_above_quantized(tmp_path):
    fp, quantized = random_images(12, 32, 1), random_images(12, 32, 2)
    comparison_grid(fp, quantized, tmp_path / "grid.png", n=10, columns=4)
    picture = np.asarray(Image.open(tmp_path / "grid.png"))
    tile = np.asarray(fp[0].permute(1, 2, 0)).repeat(2, 0).repeat(2, 1)  # magnified to 64 pixels
    top, left = 2, picture.shape[1] - (4 * 66 + 2) + 2
    np.testing.assert_array_equal(picture[top : top + 64, left : left + 64], tile)
    tile = np.asarray(quantized[0].permute(1, 2, 0)).repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(picture[top + 66 : top + 130, left : left + 64], tile)
    assert picture.shape[0] == 6 * 66 + 2 * 4 + 2  # three pairs of rows


def test_grids_take_fewer_images_and_refuse_unequal_ones(tmp_path):
    comparison_grid(random_images(3), random_images(3), tmp_path / "small.png", n=16)
    grid(random_images(10), tmp_path / "sub" / "samples.png", columns=4)
    with pytest.raises(ValueError, match="pair up"):
        comparison_grid(random_images(3), random_images(3, 16), tmp_path / "x.png")
    with pytest.raises(ValueError, match="uint8"):
        grid(random_images(3).float(), tmp_path / "x.png")


@pytest.mark.parametrize("n", [0, 7])
def test_a_file_written_in_parts_is_that_of_numpy_and_is_read_as_a_map(tmp_path, n):
    images = random_images(7, 9)[:n]
    np.save(tmp_path / "whole.npy", images.numpy())
    with writing_file(tmp_path / "parts.npy", n) as append:
        for part in images.split(3) if n else [images]:
            append(part.contiguous(memory_format=torch.channels_last))
    assert (tmp_path / "parts.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
    read = read_file(tmp_path / "parts.npy")
    assert torch.equal(read, images)
    read.zero_()
    assert torch.equal(read_file(tmp_path / "parts.npy"), images)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_reading_a_file_in_parts_takes_no_memory_of_its_own(tmp_path):
    with writing_file(tmp_path / "images.npy", 1024) as append:
        for _ in range(16):
            append(torch.ones(64, 1, 256, 256, dtype=torch.uint8))
    before = _own_memory()
    images = read_file(tmp_path / "images.npy")
    peak = 0
    for part in images.split(64):
        assert int(part.sum()) == part.numel()
        peak = max(peak, _own_memory() - before)
    assert images.nbytes == 2**26 and peak < 2**24


def _own_memory() -> int:
    """Bytes that this process holds and no file backs."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


def test_a_file_is_there_only_when_it_is_whole(tmp_path):
    few = pytest.raises(ValueError, match="2 images were written into a file for 3")
    with few, writing_file(tmp_path / "images.npy", 3) as append:
        append(random_images(2, 8))
    with pytest.raises(KeyboardInterrupt), writing_file(tmp_path / "images.npy", 3) as append:
        append(random_images(2, 8))
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_images_of_a_folder_come_one_by_one(tmp_path):
    images = random_images(3, 8)
    files = write_folder(images, tmp_path)
    files[2].write_bytes(b"")
    read = each_image(files)
    assert torch.equal(next(read), images[0]) and torch.equal(next(read), images[1])
    with pytest.raises(EdadmError, match=r"000002\.png"):
        next(read)

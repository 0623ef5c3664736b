"""Images on disk: folders of PNG or JPEG files, all in one .npy file, and grids of samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from edadm.errors import EdadmError
from edadm.store import atomic_file

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg")
_TILE = 64  # smaller images are magnified in a grid, by a whole factor, to about this many pixels
_GAP = 2


def image_files(folder: str | os.PathLike, recursive: bool = False) -> list[Path]:
    """Return the PNG and JPEG files of a folder in the order of their names.

    Raises EdadmError when the folder does not exist or holds none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise EdadmError(f"no image folder at {folder}: give an existing folder of PNG or JPEG files")
    found = folder.rglob("*") if recursive else folder.iterdir()
    files = sorted(p for p in found if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        inner = not recursive and any(p.is_dir() for p in folder.iterdir())
        hint = "; its sub-folders were not searched (recursive=True does)" if inner else ""
        raise EdadmError(f"no images in {folder}: expected files ending in {', '.join(SUFFIXES)}{hint}")
    return files


def read_image(file: str | os.PathLike) -> torch.Tensor:
    """Read one image as RGB: uint8 (3, H, W); grey is repeated, an alpha channel is dropped.

    Raises EdadmError naming the file when it is broken or has more than 8 bits a channel.
    """
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise EdadmError(f"{file} has mode {image.mode}: convert it to 8 bits a channel first")
            pixels = np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise EdadmError(f"cannot read image {file}: {error}. Remove the file or write it again.") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def image_size(file: str | os.PathLike) -> tuple[int, int, int]:
    """Return the shape (3, H, W) that ``read_image`` would give, from the file's header alone."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return 3, image.height, image.width
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise EdadmError(f"cannot read image {file}: {error}. Remove the file or write it again.") from error


def read_folder(folder: str | os.PathLike, limit: int | None = None, recursive: bool = False) -> torch.Tensor:
    """Read the images of a folder in the order of their names: uint8 (N, 3, H, W).

    limit: read only the first ones. Raises EdadmError for a broken file, differing sizes or no images.
    """
    files = image_files(folder, recursive)[:limit]
    images = torch.empty(len(files), *image_size(files[0]), dtype=torch.uint8)
    for row, image in zip(images, each_image(files), strict=True):
        row.copy_(image)
    return images


def each_image(files: Sequence[Path]) -> Iterator[torch.Tensor]:
    """Yield the images of some files, uint8 (3, H, W). Raises EdadmError for a broken file and for differing sizes."""
    shape = image_size(files[0]) if files else (3, 0, 0)
    for file in files:
        image = read_image(file)
        if image.shape != shape:
            raise EdadmError(
                f"{file} is {image.shape[2]} x {image.shape[1]} but {files[0].name} is {shape[2]} x {shape[1]}: "
                "all images of a folder must have one size"
            )
        yield image


@contextmanager
def writing_file(path: Path, n: int) -> Iterator[Callable[[torch.Tensor], None]]:
    """Yield a function that appends uint8 images (k, C, H, W) to a .npy file, which is there once all n are in it.

    The file is the one that ``np.save`` writes. Parts are written, not mapped, since a full disk would kill the process
    at a write to a map. Raises EdadmError when the disk is full, ValueError for another number of images.
    """
    written = 0
    with atomic_file(path) as temporary, open(temporary, "wb") as file:

        def append(images: torch.Tensor) -> None:
            nonlocal written
            if not file.tell():
                header = {"descr": "|u1", "fortran_order": False, "shape": (n, *images.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(images.numpy().tobytes())  # tofile hides that the disk is full
            written += len(images)

        yield append
        if not n and not file.tell():
            append(torch.empty(0, 3, 0, 0, dtype=torch.uint8))
        if written != n:
            raise ValueError(f"{written} images were written into a file for {n}")


def read_file(path: Path) -> torch.Tensor:
    """Return the images of a .npy file, uint8 (N, C, H, W), mapped from the disk: what is not looked at is not read.

    Writing to the tensor leaves the file as it is.
    """
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))


def write_folder(images: torch.Tensor, folder: str | os.PathLike, start: int = 0) -> list[Path]:
    """Write uint8 images (N, 3, H, W) as 000000.png, 000001.png, ... counted from ``start``; return the files.

    Raises EdadmError when the folder cannot be written (also for a full disk).
    """
    check_images(images)
    folder = Path(folder)
    files = [folder / f"{start + i:06d}.png" for i in range(len(images))]
    for image, file in zip(images, files, strict=True):
        _save(_to_pil(image), file)
    return files


def grid(images: torch.Tensor, path: str | os.PathLike, columns: int = 8) -> None:
    """Write uint8 images (N, 3, H, W) as one PNG, row by row, small images magnified by a whole factor."""
    check_images(images)
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    _save(_compose([(row, "", 0) for row in rows]), Path(path))


def comparison_grid(
    fp: torch.Tensor, quantized: torch.Tensor, path: str | os.PathLike, n: int = 16, columns: int = 8
) -> None:
    """Write a PNG of the first n images in pairs of rows: full precision above, quantized below, from the same noise.

    Both uint8 (N, 3, H, W); fewer than n images give a smaller grid. Raises ValueError when the two do not pair up.
    """
    check_images(fp)
    check_images(quantized)
    if fp.shape[1:] != quantized.shape[1:]:
        raise ValueError(f"images of shape {tuple(fp.shape[1:])} and {tuple(quantized.shape[1:])} do not pair up")
    n = min(n, len(fp), len(quantized))
    rows: list[tuple[torch.Tensor, str, int]] = []
    for i in range(0, n, columns):
        last = min(i + columns, n)
        rows += [(fp[i:last], "FP", 2 * _GAP if i else 0), (quantized[i:last], "Q", 0)]
    _save(_compose(rows), Path(path))


def check_images(images: torch.Tensor) -> None:
    """Raise ValueError unless images are a non-empty uint8 tensor (N, 3, H, W)."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"expected uint8 images (N, 3, H, W), N > 0; got {images.dtype} {tuple(images.shape)}")


def _compose(rows: list[tuple[torch.Tensor, str, int]]) -> Image.Image:
    """Stack rows of (images, label, extra gap above) on white, labels in a margin on the left."""
    from PIL import Image, ImageDraw

    height, width = rows[0][0].shape[-2:]
    zoom = max(1, _TILE // max(height, width))
    height, width = height * zoom, width * zoom
    margin = 20 if any(label for _, label, _ in rows) else 0
    columns = max(len(row) for row, _, _ in rows)
    total = sum(height + _GAP + gap for _, _, gap in rows)
    canvas = Image.new("RGB", (margin + columns * (width + _GAP) + _GAP, total + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    top = _GAP
    for images, label, gap in rows:
        top += gap
        draw.text((3, top + height // 2), label, fill="black", anchor="lm")
        for i, image in enumerate(images):
            tile = _to_pil(image).resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(tile, (margin + _GAP + i * (width + _GAP), top))
        top += height + _GAP
    return canvas


def _to_pil(image: torch.Tensor) -> Image.Image:
    from PIL import Image

    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def _save(image: Image.Image, file: Path) -> None:
    """Write a PNG through a temporary name, so that a kill or a full disk leaves no half file under the final one."""
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(partial, format="PNG")
        partial.replace(file)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise EdadmError(f"cannot write {file}: {error}. Free space or choose another folder.") from error

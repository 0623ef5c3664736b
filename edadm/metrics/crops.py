"""The centre crops and resizes that data sets are measured with; reference and scored images get the same.

What published numbers were measured on differs by these few pixels: Latent Diffusion's LSUN loader and the released
EDA-DM code (ImageNet at 256, COCO at 300) cut out the centre square and resize it with a bicubic filter; ADM's loader,
and so its statistics of ImageNet and LSUN, resizes first and crops then.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from PIL import Image

from edadm.errors import EdadmError
from edadm.metrics.images import check_images


def square_then_resize(image: Image.Image, size: int) -> Image.Image:
    """Cut out the centre square and resize it to size x size, bicubic with antialias.

    Source: LSUN loader of CompVis/latent-diffusion; center_resize_image of the released EDA-DM code.
    """
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return square.resize((size, size), Image.Resampling.BICUBIC)


def resize_then_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to size, first halving with a box filter, then bicubic, and crop the centre.

    Source: image_datasets.center_crop_arr of openai/guided-diffusion.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


CROPS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "center_256": partial(square_then_resize, size=256),  # LSUN as Latent Diffusion, ImageNet as the released code
    "center_300": partial(square_then_resize, size=300),  # COCO as the released code
    "adm_256": partial(resize_then_crop, size=256),  # LSUN and ImageNet as ADM
}


def check_crop(name: str | None) -> None:
    """Raise EdadmError for a name that is neither None nor one of CROPS."""
    if name is not None and name not in CROPS:
        raise EdadmError(f"unknown crop {name}: choose from {', '.join(CROPS)}, or null for images as they are")


def crop(image: torch.Tensor, name: str) -> torch.Tensor:
    """Return a uint8 image (3, H, W) cropped and resized by the named rule: uint8 (3, S, S)."""
    check_crop(name)
    picture = CROPS[name](Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def crop_all(images: torch.Tensor, name: str | None) -> torch.Tensor:
    """Return uint8 images (N, 3, H, W) cropped and resized by the named rule; None leaves them as they are."""
    check_images(images)
    check_crop(name)
    return images if name is None else torch.stack([crop(image, name) for image in images])

"""Generate images in fixed chunks, so that any part of them can be made again with the same bits."""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edadm.errors import EdadmError
from edadm.sampling.guidance import Guidance, denoise_for
from edadm.sampling.interface import Correct, DiffusionSampler, unwrap
from edadm.sampling.noise import EVALUATION, noise, step_noise
from edadm.store import atomic_file

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Progress = Callable[[int, int], None]
"""Called with (done, total) after every chunk."""


def to_uint8(x: Tensor) -> Tensor:
    """Round images in [-1, 1] to bytes as the official script and torchvision's save_image do: half up, clipped."""
    return ((x + 1) / 2).clamp_(0, 1).mul_(255).add_(0.5).to(torch.uint8)


def truncated_to_uint8(x: Tensor) -> Tensor:
    """Cut images in [-1, 1] to bytes as latent diffusion's scripts do: down, clipped (golden README, ldm, 7.3)."""
    return ((x + 1) / 2).clamp_(0, 1).mul_(255).to(torch.uint8)


def generate(
    denoise: Callable[..., Any], sampler: DiffusionSampler, n_images: int, *, shape: Sequence[int], **options: Any
) -> Tensor:
    """Return all images of ``generate_chunks``, which says what the arguments are, as uint8 (n_images, C, H, W)."""
    return torch.cat(list(generate_chunks(denoise, sampler, n_images, shape=shape, **options)))


def generate_chunks(
    denoise: Callable[..., Any],
    sampler: DiffusionSampler,
    n_images: int,
    *,
    shape: Sequence[int],
    seed: int,
    chunk: int = 64,
    stream: str = EVALUATION,
    guidance: Guidance | None = None,
    to_images: Callable[[Tensor], Tensor] = to_uint8,
    folder: Path | None = None,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    correct: Correct | None = None,
    progress: Progress | None = None,
) -> Iterator[Tensor]:
    """Sample ``n_images`` images, turn them into bytes and yield them chunk by chunk; memory holds one chunk.

    denoise: the network, called with x and times, and with the condition by name where there is guidance.
    shape: (C, H, W) of one sample. to_images: float32 samples to uint8 images, which decodes where samples are latents.
    Chunk c always holds the image numbers c * chunk to (c + 1) * chunk - 1, also where fewer are asked for, so an image
    depends on its number and the chunk size only. folder: keeps every finished chunk (whole, also a last partial one)
    and those found there are not sampled again; it must belong to one network, sampler, guidance, seed and chunk.
    precision: autocast of the network call; the sampler computes in float32.
    Yields uint8 (at most chunk, C, H, W) on the CPU; no images are one empty chunk in the shape of a sample.
    Raises Diverged when NaN or Inf appears, naming the step.
    """
    if n_images < 0 or chunk < 1:
        raise ValueError(f"cannot generate {n_images} images in chunks of {chunk}")
    place = torch.device(device)

    def network(x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        with autocast(place, precision):
            return unwrap(denoise(x, t, **condition))

    def sample(numbers: Sequence[int]) -> Tensor:
        bound = denoise_for(network, guidance, stream, seed, numbers, place)
        x = noise(stream, seed, numbers, shape).to(place)
        x = sampler.run(bound, x, sampler_noise(stream, seed, numbers, shape, place), correct=correct)
        return to_images(x).cpu()

    if not n_images:
        yield torch.empty(0, *shape, dtype=torch.uint8)
    for start in range(0, n_images, chunk):
        path = folder / f"chunk-{start // chunk:06d}.npz" if folder is not None else None
        made = _read_chunk(path, chunk) if path is not None else None
        if made is None:
            made = sample(range(start, start + chunk))
            if path is not None:
                _write_chunk(path, made)
        stop = min(start + chunk, n_images)
        if progress is not None:
            progress(stop, n_images)
        yield made[: stop - start]


def sampler_noise(
    stream: str, seed: int, numbers: Sequence[int], shape: Sequence[int], device: torch.device | str
) -> Callable[[int], Tensor]:
    """Return the function that gives a stochastic sampler its noise for call k; nothing is drawn before it is asked."""
    return lambda k: step_noise(stream, seed, k, numbers, shape).to(device)


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Return the autocast context of a precision (fp32, bf16 or fp16); float32 switches nothing.

    Raises EdadmError for another name.
    """
    if precision not in PRECISIONS:
        raise EdadmError(f"no precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def _write_chunk(path: Path, images: Tensor) -> None:
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, images=images.numpy())


def _read_chunk(path: Path, size: int) -> Tensor | None:
    """Return a finished chunk, or None if there is none or it is broken; the zip format holds a checksum."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            images = archive["images"]
        if images.ndim != 4 or len(images) != size or images.dtype != np.uint8:
            raise ValueError(f"it holds {images.dtype} {images.shape}, not {size} images of uint8")
    except (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        logger.warning("%s is broken (%s): these images are sampled again", path, error)
        return None
    return torch.from_numpy(images)

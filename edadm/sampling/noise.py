"""Random numbers that depend on what they are for, never on how the work is cut into batches.

Every stream is named: the numbers are a function of (stream, seed, keys) alone, so images do not change with the batch
size, the number of images, a resumed run or the machine's number of threads. Minibatches and QDrop masks have streams
of their own in `edadm.reconstruction.random`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CALIBRATION = "calibration"  # start of the full-precision trajectories
EVALUATION = "evaluation"  # start of the images that are scored
SELECTION = "selection"  # which rows of the trajectories calibrate


def numpy_rng(stream: str, seed: int, *keys: str | int) -> np.random.Generator:
    """Return a generator that depends on the name of the stream, the seed and the keys only."""
    text = "\x1f".join((stream, str(int(seed)), *map(str, keys)))
    key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")
    return np.random.Generator(np.random.Philox(key=key))  # its normal draws use no CPU-specific code path


def noise(stream: str, seed: int, indices: Sequence[int], shape: Sequence[int], *keys: str | int) -> Tensor:
    """Draw one standard normal tensor per image number.

    Returns float32 (len(indices), *shape) on the CPU; the row of image number i depends on (stream, seed, keys, i).
    """
    out = torch.empty(len(indices), *shape)
    for row, index in zip(out.numpy(), indices, strict=True):
        numpy_rng(stream, seed, *keys, int(index)).standard_normal(dtype=np.float32, out=row)
    return out


def step_noise(stream: str, seed: int, step: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Draw the noise that a stochastic sampler adds after network call ``step``; see `noise`."""
    return noise(f"{stream}/step", seed, indices, shape, step)

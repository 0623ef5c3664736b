"""The images of a step: without repetition within an epoch, and a function of seed and step alone."""

from __future__ import annotations

import numpy as np
import torch


class Order:
    """Which rows a step takes and which of them are mirrored."""

    def __init__(self, n: int, batch: int, seed: int):
        self.n, self.batch, self.seed = n, batch, seed
        self.steps_per_epoch = n // batch
        self.epoch, self.order = -1, np.empty(0, np.int64)

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return row numbers int64 (batch,) and whether each is mirrored, bool (batch,)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.n)
        rows = self.order[position * self.batch : (position + 1) * self.batch]
        return rows, np.random.default_rng((self.seed, 1, step)).random(len(rows)) < 0.5


class Shuffled:
    """Minibatches of images, half of them mirrored, and their labels."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, batch: int, seed: int):
        self.images, self.labels = images, labels
        self.order = Order(len(images), batch, seed)
        self.steps_per_epoch = self.order.steps_per_epoch

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Return uint8 images (batch, 3, H, W) and int64 labels (batch,)."""
        rows, flip = self.order(step)
        images = self.images[rows]
        images[flip] = images[flip, :, :, ::-1]
        return images, self.labels[rows]


def to_unit_range(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """Return bytes as float32 in [-1, 1]."""
    return torch.from_numpy(images).to(device).float().div_(127.5).sub_(1)


def shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move each image of (N, 3, 32, 32) by up to 4 pixels, mirrored at the border."""
    padded = np.pad(images, ((0, 0), (0, 0), (4, 4), (4, 4)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (32, 32), axis=(2, 3))
    top, left = rng.integers(0, 9, (2, len(images)))
    return windows[np.arange(len(images)), :, top, left].copy()

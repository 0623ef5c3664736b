"""The random choices of a reconstruction: which rows form a minibatch and which elements are quantized."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import numpy as np
import torch

INPUT_MIX = "input_mix"


class RandomSource:
    """Draw minibatches and masks from streams that depend on the seed and the keys alone.

    One source serves one unit in one phase, so units can be repeated or resumed on their own. Override ``indices`` and
    ``mask`` to replay stored choices (golden README 2.3).
    """

    def __init__(self, seed: int, *keys: str):
        self._seed = _derive(seed, *keys)
        self._host = np.random.Generator(np.random.SFC64(self._seed))
        self._device: torch.Generator | None = None

    def indices(self, iteration: int, rows: int, batch: int) -> torch.Tensor:
        """Return ``batch`` different row numbers below ``rows``, int64."""
        return torch.from_numpy(self._host.choice(rows, batch, replace=False))

    def mask(
        self, iteration: int, site: str, pass_index: int, shape: torch.Size, p: float, device: torch.device
    ) -> torch.Tensor:
        """Return a fresh bool mask that is True (quantized) with probability p.

        site: name of the activation quantizer, or ``INPUT_MIX`` for the input of the unit.
        pass_index: 0 for the forward pass of the block loss, 1 for that of the layer losses.
        """
        if device.type != "cpu":
            return torch.rand(shape, device=device, generator=self._on(device)) < p
        count = math.prod(shape)
        if p == 0.5:
            flat = np.unpackbits(self._words(count, bits=1).view(np.uint8), count=count).view(np.bool_)
        else:
            flat = self._words(count, bits=16).view(np.uint16)[:count] < round(p * 2**16)
        return torch.from_numpy(flat).view(shape)

    def _words(self, count: int, bits: int) -> np.ndarray:
        """Return enough random 64-bit words for ``count`` numbers of ``bits`` bits."""
        return self._host.bit_generator.random_raw(-(-count * bits // 64))

    def _on(self, device: torch.device) -> torch.Generator:
        if self._device is None:
            self._device = torch.Generator(device)
            self._device.manual_seed(self._seed % 2**63)
        return self._device


RandomFactory = Callable[[str, str], RandomSource]
"""Return the source for a phase name and a unit name."""


def seeded(seed: int) -> RandomFactory:
    """Return a factory of independent sources, one per phase and unit, all derived from ``seed``."""
    return lambda phase, unit: RandomSource(seed, phase, unit)


def _derive(seed: int, *keys: str) -> int:
    """Hash a seed and names to 64 bits."""
    text = "\x1f".join(("reconstruction", str(seed), *keys))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")

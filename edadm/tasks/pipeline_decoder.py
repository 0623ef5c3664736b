"""From the latents of a pipeline to bytes, as the pipeline decodes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from edadm.tasks.latent import DECODED_AT_ONCE


def pixels_per_position(config: Mapping[str, Any]) -> int:
    """Return how many pixels wide a position of an autoencoder's latent is."""
    return 2 ** (len(config["block_out_channels"]) - 1)


@dataclass(frozen=True)
class PipelineDecoder:
    """The decoder of a pipeline's autoencoder; images are rounded to bytes (diffusers' VaeImageProcessor).

    config: of the autoencoder. load: reads it.
    """

    config: Mapping[str, Any]
    load: Callable[[], nn.Module]
    version: ClassVar[int] = 1

    @property
    def side(self) -> int:
        """How many pixels wide a position of the latent is."""
        return pixels_per_position(self.config)

    def on(self, device: str) -> Callable[[Tensor], Tensor]:
        """Return the function from float32 latents (B, c, h, w) to uint8 images; its first call reads the weights."""
        network = cache(lambda: self.load().to(device).eval().requires_grad_(False))

        @torch.no_grad()
        def decode(latents: Tensor) -> Tensor:
            model: Any = network()
            parts = [model.decode(part).sample for part in self._unscaled(latents).split(DECODED_AT_ONCE)]
            return torch.cat([(part / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8) for part in parts])

        return decode

    def _unscaled(self, latents: Tensor) -> Tensor:
        """Return what the autoencoder decodes: its latents have a factor, and a shift or a mean and deviation."""
        factor = self.config.get("scaling_factor", 1.0)
        mean, deviation = self.config.get("latents_mean"), self.config.get("latents_std")
        if mean is None or deviation is None:
            return latents / factor + (self.config.get("shift_factor") or 0.0)
        by_channel = [latents.new_tensor(numbers).view(1, -1, 1, 1) for numbers in (deviation, mean)]
        return latents * by_channel[0] / factor + by_channel[1]

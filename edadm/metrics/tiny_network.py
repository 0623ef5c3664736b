"""The small CIFAR-10 classifier whose features give the embedded proxies fd_tiny, sfd_tiny and is_tiny."""

from __future__ import annotations

import torch
from torch import nn

CHANNELS = 128
NOISE_GAIN = 4.0
SPATIAL_CHANNELS = 7
SPATIAL_SIZE = 4


def _conv(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()
    )


class _Residual(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(_conv(channels, channels), _conv(channels, channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class TinyResNet(nn.Module):
    """An eleven-layer residual network (after He et al. 2016) for 32 x 32 RGB images in [-1, 1].

    It classifies, and estimates the deviation of the noise in an image. A classifier alone has no reason to place more
    noise farther away, so the estimate is one of the pooled features: NOISE_GAIN times a linear map of the others.
    """

    def __init__(self, classes: int = 10):
        super().__init__()
        self.stem = _conv(3, 32)
        self.stage1 = nn.Sequential(_conv(32, 64), nn.MaxPool2d(2), _Residual(64))
        self.stage2 = nn.Sequential(_conv(64, 128), nn.MaxPool2d(2), _Residual(128))
        self.stage3 = nn.Sequential(_conv(128, CHANNELS), nn.MaxPool2d(2), _Residual(CHANNELS))
        self.head = nn.Linear(CHANNELS, classes)
        self.noise = nn.Linear(CHANNELS, 1)

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return pooled (B, 129), spatial (B, 7 * 4 * 4) and logits (B, 10) of x (B, 3, 32, 32) in [-1, 1]."""
        h = self.stage2(self.stage1(self.stem(x)))
        spatial = nn.functional.adaptive_avg_pool2d(h[:, :SPATIAL_CHANNELS], SPATIAL_SIZE).flatten(1)
        last = self.stage3(h).mean((2, 3))
        return torch.cat([last, NOISE_GAIN * self.noise(last)], dim=1), spatial, self.head(last)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits (B, 10) and the deviation of the noise (B,), both to be trained."""
        pooled, _, logits = self.features(x)
        return logits, pooled[:, -1] / NOISE_GAIN

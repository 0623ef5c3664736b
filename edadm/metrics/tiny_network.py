"""The small CIFAR-10 classifier whose features give the embedded proxies fd_tiny, sfd_tiny and is_tiny."""

from __future__ import annotations

import torch
from torch import nn

POOLED_FEATURES = 128
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
    """A nine-layer residual network for 32 x 32 RGB images in [-1, 1], after He et al. 2016."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.stem = _conv(3, 24)
        self.stage1 = nn.Sequential(_conv(24, 48), nn.MaxPool2d(2), _Residual(48))
        self.stage2 = nn.Sequential(_conv(48, 96), nn.MaxPool2d(2))
        self.stage3 = nn.Sequential(_conv(96, POOLED_FEATURES), nn.MaxPool2d(2), _Residual(POOLED_FEATURES))
        self.head = nn.Linear(POOLED_FEATURES, classes)

    def features(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return pooled (B, 128), spatial (B, 7 * 4 * 4) and logits (B, 10) of x (B, 3, 32, 32) in [-1, 1]."""
        h = self.stage2(self.stage1(self.stem(x)))
        spatial = nn.functional.adaptive_avg_pool2d(h[:, :SPATIAL_CHANNELS], SPATIAL_SIZE).flatten(1)
        pooled = self.stage3(h).mean((2, 3))
        return pooled, spatial, self.head(pooled)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, 10)."""
        return self.features(x)[2]

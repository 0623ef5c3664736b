"""Range initialisation: scale and zero point of weights (per output channel) and activations (per tensor)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from edadm.errors import Diverged
from edadm.quant.quantizer import ActivationQuantizer

SMALLEST_SCALE = 1e-8


def qparams(lo: torch.Tensor, hi: torch.Tensor, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    scale = ((hi - lo) / (levels - 1)).clamp_(min=SMALLEST_SCALE)
    zero_point = (0 - torch.round(lo / scale)).clamp_(0, levels - 1)
    return scale, zero_point


def _scores(rows, scale, zero_point, levels, exponent):
    buffer = torch.div(rows, scale).round_().clamp_(-zero_point, levels - 1 - zero_point).mul_(scale)
    return buffer.sub_(rows).abs_().pow_(exponent).mean(1)


def search(rows, scales, zero_points, levels, exponent=2.4):
    best = torch.full((len(rows),), float("inf"))
    index = torch.zeros(len(rows), dtype=torch.long)
    for k in range(scales.shape[1]):
        s = _scores(rows, scales[:, k:k+1], zero_points[:, k:k+1], levels, exponent)
        better = s < best
        index[better] = k
        best = torch.where(better, s, best)
    return index


def _side(lo, hi):
    return "positive" if lo >= 0 else "negative" if hi <= 0 else "both"


@dataclass(frozen=True)
class MSE:
    version: ClassVar[int] = 1
    symmetric: bool = True
    exponent: float = 2.4
    candidates: int = 100
    momentum: float = 0.9
    mid_zero_point: bool = False

    def _ranges(self, lo, hi, side):
        i = torch.arange(1, self.candidates + 1, device=lo.device, dtype=torch.float32)
        t = torch.maximum(lo.abs(), hi)[:, None] / self.candidates * i
        zero = torch.zeros_like(t)
        return (zero if side == "positive" else -t), (zero if side == "negative" else t)

    def weight(self, weight, bits):
        rows = weight.detach().flatten(1)
        lo, hi = torch.aminmax(rows, dim=1)
        los, his = self._ranges(lo, hi, _side(lo.min(), hi.max()))
        scale, zp = qparams(los, his, 2**bits)
        best = search(rows, scale, zp, 2**bits, self.exponent)[:, None]
        return scale.gather(1, best)[:, 0], zp.gather(1, best)[:, 0]

    def update(self, quantizer: ActivationQuantizer, x):
        rows = x.detach().reshape(1, -1)
        lo, hi = torch.aminmax(rows, dim=1)
        if not torch.isfinite(hi - lo).all():
            raise Diverged(f"input of activation quantizer {quantizer.name} has NaN or Inf")
        if quantizer.side is None:
            quantizer.side = _side(lo, hi)
        los, his = self._ranges(lo, hi, quantizer.side)
        scale, zp = qparams(los, his, quantizer.levels)
        best = search(rows, scale, zp, quantizer.levels, self.exponent)[0]
        lo, hi = los[0, best], his[0, best]
        if quantizer.running_min is None:
            quantizer.running_min, quantizer.running_max = lo, hi
        quantizer.running_min = (1 - self.momentum) * lo + self.momentum * quantizer.running_min
        quantizer.running_max = (1 - self.momentum) * hi + self.momentum * quantizer.running_max
        quantizer.set(*qparams(quantizer.running_min, quantizer.running_max, quantizer.levels))

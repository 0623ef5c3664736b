"""Range initialisation: scale and zero point of weights (per output channel) and activations (per tensor).

A range rule has two methods: ``weight(weight, bits)`` returns scale and zero point, each (C_out,), and
``update(quantizer, x)`` takes one more batch into the range of an activation quantizer. ``version`` is raised whenever
a rule would give other numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from edadm.errors import Diverged
from edadm.quant.quantizer import ActivationQuantizer
from edadm.quant.range_search import SMALLEST_SCALE, search, symmetric_bounds

Qparams = tuple[torch.Tensor, torch.Tensor]


def qparams(lo: torch.Tensor, hi: torch.Tensor, levels: int) -> Qparams:
    """Return scale and zero point (float32, shape of lo) of the range [lo, hi], widened to contain 0.

    The order of the float32 operations matters: with lo = -hi the exact zero point is a half-integer, and rounding
    error decides which neighbour is taken. Source: golden README 6.1 and 6.3.
    """
    lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    scale = ((hi - lo) / (levels - 1)).clamp_(min=SMALLEST_SCALE)
    return scale, (0 - torch.round(lo / scale)).clamp_(0, levels - 1)


def extrema(rows: torch.Tensor, name: str) -> Qparams:
    """Return minimum and maximum of each row of rows (C, n). Raises Diverged on NaN or Inf, naming the quantizer."""
    lo, hi = torch.aminmax(rows, dim=1)
    if not torch.stack([lo, hi]).isfinite().all():
        raise Diverged(f"NaN or Inf in the tensor that sets the range of {name}: look at the layers before it")
    return lo, hi


def activation_extrema(x: torch.Tensor, name: str) -> Qparams:
    """Return minimum and maximum of x, each (1,); a constant takes 0 in, or a range without width would erase it.

    The softmax of a cross-attention over a single token is such a constant (LDM-4 ImageNet).
    """
    lo, hi = extrema(x.reshape(1, -1), name)
    constant = lo == hi
    return torch.where(constant, lo.clamp(max=0), lo), torch.where(constant, hi.clamp(min=0), hi)


def _side(lo: torch.Tensor, hi: torch.Tensor) -> str:
    lowest, highest = torch.stack([lo.amin(), hi.amax()]).tolist()
    return "positive" if lowest >= 0 else "negative" if highest <= 0 else "both"


@dataclass(frozen=True)
class MSE:
    """Search the range with the smallest mean |x - Q(x)| ** exponent; EDA-DM's ranges (golden README 6.2-6.4, 7.1-7.2).

    symmetric: ``candidates`` thresholds t up to max |x|, range [-t, t], or [0, t] / [-t, 0] if the whole tensor (for
    activations: the first batch) has one sign. Otherwise all widths and zero points, which is slow and used by no
    script. Activations keep a running range, 0.1 new + 0.9 old, that starts at the first batch. mid_zero_point: the
    zero point of a two-sided symmetric range is levels / 2 (preset ``paper``), not what float rounding makes it.
    """

    symmetric: bool = True
    exponent: float = 2.4
    candidates: int = 100
    momentum: float = 0.9
    mid_zero_point: bool = False
    version: int = 1

    @torch.no_grad()
    def weight(self, weight: torch.Tensor, bits: int, name: str = "a weight") -> Qparams:
        """Return scale and zero point, each (C_out,), of a weight (C_out, ...)."""
        rows = weight.flatten(1)
        lo, hi = extrema(rows, name)
        side = _side(lo, hi)
        lo, hi = self._best_range(rows, lo, hi, 2**bits, side, side)
        return self._qparams(lo, hi, 2**bits, side)

    @torch.no_grad()
    def update(self, quantizer: ActivationQuantizer, x: torch.Tensor) -> None:
        """Search the range of the batch x, move the running range and set scale and zero point of the quantizer."""
        rows = x.reshape(1, -1)
        lo, hi = extrema(rows, quantizer.name)
        side = _side(lo, hi)
        if quantizer.side is None:
            quantizer.side = side
        lo, hi = self._best_range(rows, lo, hi, quantizer.levels, quantizer.side, side, widen=False)
        if quantizer.running is None:
            quantizer.running = lo, hi
        keep, new = self.momentum, 1 - self.momentum
        lo, hi = quantizer.running = new * lo + keep * quantizer.running[0], new * hi + keep * quantizer.running[1]
        quantizer.set(*self._qparams(lo, hi, quantizer.levels, quantizer.side))

    def _qparams(self, lo, hi, levels, side):
        scale, zero_point = qparams(lo, hi, levels)
        if self.mid_zero_point and self.symmetric and side == "both":
            zero_point = torch.full_like(zero_point, levels // 2)
        return scale, zero_point

    def _best_range(self, rows, lo, hi, levels, side, side_of_data, widen=True):
        """Return the best (lo, hi), each (C,). widen: measure the widths of the 2-D search from 0 (weights)."""
        i = torch.arange(1, self.candidates + 1, device=rows.device, dtype=rows.dtype)
        if self.symmetric or side != "both":
            radius = torch.maximum(lo.abs(), hi)
            t = radius[:, None] / self.candidates * i
            zero = torch.zeros_like(t)
            lows, highs = zero if side == "positive" else -t, zero if side == "negative" else t
        else:
            if widen:
                lo, hi = lo.clamp(max=0), hi.clamp(min=0)
            width = ((hi - lo)[:, None] / self.candidates * i)[:, :, None]
            below = torch.arange(levels, device=rows.device, dtype=rows.dtype) * (width / (levels - 1))
            lows, highs = (-below).flatten(1), (width - below).flatten(1)
        scales, zero_points = self._qparams(lows, highs, levels, side)
        bounds = None
        if lows.shape[1] == self.candidates and side in ("both", side_of_data):
            bounds = symmetric_bounds(rows, radius, scales, zero_points, levels, self.exponent, side)
        best = search(rows, scales, zero_points, levels, self.exponent, bounds)[:, None]
        return lows.gather(1, best)[:, 0], highs.gather(1, best)[:, 0]


def minmax_qparams(lo: torch.Tensor, hi: torch.Tensor, levels: int, always_zero: bool = False) -> Qparams:
    """Return scale and zero point (float32) from extrema, as the ``max`` mode of EDA-DM and Q-Diffusion does.

    The scale is (hi - lo) / (levels - 1) even if 0 lies outside [lo, hi]; the zero point is -min(lo, 0) / scale,
    rounded, not clamped to the codes, or 0 with always_zero. Computed in float64 like the official Python floats.
    Source: golden README 6.5, 12.1.
    """
    lo, hi = lo.double(), hi.double()
    scale = ((hi - lo) / (levels - 1)).clamp_(min=SMALLEST_SCALE)
    zero_point = torch.zeros_like(scale) if always_zero else torch.round(-lo.clamp(max=0) / scale)
    return scale.float(), zero_point.float()


def affine_qparams(lo: torch.Tensor, hi: torch.Tensor, levels: int, always_zero: bool = False) -> Qparams:
    """Return (hi - lo) / (levels - 1) and the unclamped zero point round(-lo / scale), or hi / (levels - 1) and 0.

    A positive lo gives a negative zero point. Q-Diffusion's shrink search and running range; golden README 12.1, 12.2.
    """
    scale = ((hi if always_zero else hi - lo) / (levels - 1)).clamp_(min=SMALLEST_SCALE)
    return scale, torch.zeros_like(scale) if always_zero else torch.round(-lo / scale)


def signed_qparams(lo: torch.Tensor, hi: torch.Tensor, levels: int) -> Qparams:
    """Return scale = max |x| / (levels / 2 - 1) and the zero point levels / 2 of Q-Diffusion's symmetric activations.

    Q-Diffusion keeps signed codes and zero point 0; the shifted codes give the same values. Golden README 12.1.
    """
    scale = torch.maximum(lo.abs(), hi.abs()) / (levels // 2 - 1)
    return scale.clamp_(min=SMALLEST_SCALE), torch.full_like(scale, levels // 2)


@dataclass(frozen=True)
class MinMax:
    """Take the extrema as the range; for activations those of the last batch seen: EDA-DM's ``max`` mode.

    always_zero: zero point 0 for activations (meant for softmax outputs). Source: golden README 6.5, 7.3.
    """

    always_zero: bool = False
    version: int = 1

    @torch.no_grad()
    def weight(self, weight: torch.Tensor, bits: int, name: str = "a weight") -> Qparams:
        """Return scale and zero point, each (C_out,), of a weight (C_out, ...)."""
        return minmax_qparams(*extrema(weight.flatten(1), name), 2**bits)

    @torch.no_grad()
    def update(self, quantizer: ActivationQuantizer, x: torch.Tensor) -> None:
        """Set scale and zero point of the quantizer from the extrema of x alone."""
        lo, hi = activation_extrema(x, quantizer.name)
        quantizer.set(*minmax_qparams(lo, hi, quantizer.levels, self.always_zero))


@dataclass(frozen=True)
class QDiffusionMinMax:
    """Q-Diffusion's ranges from extrema: affine weights, activations from the first batch (golden README 12.1, 12.2).

    symmetric: signed activations, the default of its CIFAR-10 and Bedroom commands; otherwise affine, with zero point 0
    if always_zero. running: every batch after the first moves the extrema, momentum * old + (1 - momentum) * new.
    """

    symmetric: bool = True
    running: bool = False
    momentum: float = 0.95
    always_zero: bool = False
    version: int = 1

    @torch.no_grad()
    def weight(self, weight: torch.Tensor, bits: int, name: str = "a weight") -> Qparams:
        """Return scale and zero point, each (C_out,), of a weight (C_out, ...)."""
        return minmax_qparams(*extrema(weight.flatten(1), name), 2**bits)

    @torch.no_grad()
    def update(self, quantizer: ActivationQuantizer, x: torch.Tensor) -> None:
        """Set the range of the quantizer from its first batch; move it with later ones if ``running``."""
        rows = x.reshape(1, -1)
        if quantizer.running is None:
            lo, hi = quantizer.running = activation_extrema(x, quantizer.name)
            quantizer.set(*self._first(rows, lo, hi, quantizer.levels))
        elif self.running:
            lo, hi = activation_extrema(x, quantizer.name)
            keep, new = self.momentum, 1 - self.momentum
            lo, hi = quantizer.running = quantizer.running[0] * keep + lo * new, quantizer.running[1] * keep + hi * new
            rule = signed_qparams if self.symmetric else partial(affine_qparams, always_zero=self.always_zero)
            quantizer.set(*rule(lo, hi, quantizer.levels))

    def _first(self, rows: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, levels: int) -> Qparams:
        if self.symmetric:
            return signed_qparams(lo, hi, levels)
        return minmax_qparams(lo, hi, levels, self.always_zero)


@dataclass(frozen=True)
class QDiffusionShrink(QDiffusionMinMax):
    """Q-Diffusion's ``mse`` mode: the best of the ranges (1 - 0.01 i) * (min, max), i = 0..79 (golden README 12.1).

    search_activations: search those as well, on the first batch; otherwise they take extrema. A running range moves
    with the extrema in both cases and so discards the search, as the official code does. Raises ValueError for searched
    symmetric activations: the official search does not use their grid.
    """

    symmetric: bool = False
    search_activations: bool = True
    exponent: float = 2.4
    steps: int = 80

    def __post_init__(self) -> None:
        if self.symmetric and self.search_activations:
            raise ValueError("no shrink search on a symmetric grid: set symmetric or search_activations to false")

    @torch.no_grad()
    def weight(self, weight: torch.Tensor, bits: int, name: str = "a weight") -> Qparams:
        """Return scale and zero point, each (C_out,), of a weight (C_out, ...)."""
        rows = weight.flatten(1)
        return self._shrink(rows, *extrema(rows, name), 2**bits, always_zero=False)

    def _first(self, rows: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, levels: int) -> Qparams:
        if self.search_activations:
            return self._shrink(rows, lo, hi, levels, self.always_zero)
        return super()._first(rows, lo, hi, levels)

    def _shrink(
        self, rows: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, levels: int, always_zero: bool
    ) -> Qparams:
        factors = torch.tensor([1 - 0.01 * i for i in range(self.steps)], device=rows.device)
        lows, highs = lo[:, None] * factors, hi[:, None] * factors
        scales, zero_points = affine_qparams(lows, highs, levels, always_zero)
        best = search(rows, scales, zero_points, levels, self.exponent)[:, None]
        return scales.gather(1, best)[:, 0], zero_points.gather(1, best)[:, 0]

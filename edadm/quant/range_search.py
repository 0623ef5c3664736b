"""Search a grid of candidate ranges for the smallest quantization error, row by row and exactly.

The score of a candidate is mean |x - Q(x)| ** exponent over a row, in float32, and the first smallest score wins, as in
the released code, which evaluates every candidate on every element. Here three steps come to the same index:

1. A histogram of the row (counts and first moments of its bins) gives a lower bound of every score. The error of a
   fixed grid is convex between two rounding boundaries, so its tangent at the middle of a bin bounds it; in a bin
   with a boundary inside, a chord does. With rows scaled to radius 1 the bounds are one matrix product with a table
   that depends on the bit width alone.
2. Candidates whose bound exceeds the score of the best bounded one are out. The others are scored with a cheap power.
3. Only candidates that tie within the error of the cheap power are scored as defined.
"""

from __future__ import annotations

import functools

import torch

SMALLEST_SCALE = 1e-8
SLACK = 1e-3  # relative; covers float32 error of the bounds and of the candidates' grids
TIE = 5e-5  # relative; the cheap power agrees with torch.pow to about 3e-6
CPU_CHUNK = 2**15  # elements that stay in the L2 cache while a chunk of candidates is scored
GPU_CHUNK = 2**26
BINS_PER_LEVEL, FEWEST_BINS, MOST_BINS = 32, 512, 8192


def search(
    rows: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    levels: int,
    exponent: float,
    bounds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the index (C,) of the first candidate with the smallest mean |x - Q(x)| ** exponent in each row.

    rows: (C, n) finite float32; scales, zero_points: (C, K); bounds: (C, K) lower bounds of the scores from
    ``symmetric_bounds``, None to score every candidate.
    """
    every = functools.partial(_scores, rows, scales, zero_points, levels, exponent)
    wanted = torch.ones_like(scales, dtype=torch.bool)
    scores = torch.full_like(scales, torch.inf)
    if bounds is not None:
        likely = torch.zeros_like(wanted).scatter_(1, bounds.argmin(1, keepdim=True), True)
        every(likely, scores, exact=False)
        wanted = (bounds * (1 - SLACK) <= scores.amin(1, keepdim=True)) & ~likely
    every(wanted, scores, exact=False)
    ties = scores <= scores.amin(1, keepdim=True) * (1 + TIE) + torch.finfo(scores.dtype).tiny
    several = ties & (ties.sum(1, keepdim=True) > 1)
    scores = torch.where(ties, 0.0, torch.inf)
    every(several, scores, exact=True)
    position = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
    return torch.where(scores == scores.amin(1, keepdim=True), position, scores.shape[1]).amin(1)


def _scores(rows, scales, zero_points, levels, exponent, wanted, scores, exact):
    """Write the scores of the wanted (row, candidate) pairs into scores (C, K)."""
    row, candidate = wanted.nonzero(as_tuple=True)
    n = rows.shape[1]
    size = max(1, (GPU_CHUNK if rows.is_cuda else CPU_CHUNK) // n)
    for pair in zip(row.split(size), candidate.split(size), strict=True):
        scale, zero_point = scales[pair][:, None], zero_points[pair][:, None]
        x = rows if len(rows) == 1 else rows.index_select(0, pair[0])
        error = torch.div(x, scale).round_()
        torch.maximum(error, -zero_point, out=error)
        torch.minimum(error, levels - 1 - zero_point, out=error)
        error.mul_(scale).sub_(x).abs_()
        power = error.pow_(exponent) if exact else error.log2_().mul_(exponent).exp2_()
        scores[pair] = power.mean(1)


def symmetric_bounds(
    rows: torch.Tensor,
    radius: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor,
    levels: int,
    exponent: float,
    side: str,
) -> torch.Tensor | None:
    """Return lower bounds (C, K) of the scores of the candidates t_i = radius * i / K, i = 1..K.

    rows: (C, n) with elements in [-radius, radius] ("both" sides), [0, radius] ("positive") or [-radius, 0]
    ("negative"); radius: (C,). The ranges are [-t, t], [0, t] or [-t, 0]. None if no bound is known.
    """
    if exponent < 1:
        return None
    bins = _bins(levels, rows.shape[1])
    table = _bound_table(levels, bins, scales.shape[1], exponent, side == "both", rows.device)
    bounds = torch.empty_like(scales)
    size = max(1, 2**21 // bins)
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        bounds[part] = _bounds(rows[part], radius[part], zero_points[part], levels, table, bins, side)
    bounds *= (radius.pow(exponent) / rows.shape[1])[:, None]
    return bounds.masked_fill_(scales <= SMALLEST_SCALE, 0)


def _bins(levels: int, n: int) -> int:
    """Return a number of bins fine enough for the grid, but no more than pays off for n elements."""
    return min(max(FEWEST_BINS, BINS_PER_LEVEL * levels), MOST_BINS, max(FEWEST_BINS, 2 ** (n - 1).bit_length()))


def _bounds(rows, radius, zero_points, levels, table, bins, side):
    radius = torch.where(radius > 0, radius, 1.0)[:, None]
    if side != "both":
        return _histogram(rows, bins / (radius if side == "positive" else -radius), 0, bins).flatten(1) @ table
    histogram = _histogram(rows, bins / 2 / radius, bins / 2, bins)  # (C, 2, bins)
    mirrored = histogram.flip(2) * histogram.new_tensor([1.0, -1.0])[:, None]  # of -rows: its zero point is levels / 2
    low, high = (torch.cat([histogram, mirrored]).flatten(1) @ table).chunk(2)
    return torch.where(zero_points < levels // 2, low, high)


def _histogram(rows: torch.Tensor, factor: torch.Tensor, shift: float, bins: int) -> torch.Tensor:
    """Return (C, 2, bins): counts of the bins of rows * factor + shift, and sums of the offsets from their middles."""
    position = (rows * factor).add_(shift)
    index = position.to(torch.int32).clamp_(0, bins - 1)
    offset = position.sub_(index).sub_(0.5)
    index = index.add_(torch.arange(len(rows), device=rows.device, dtype=torch.int32)[:, None] * bins).flatten()
    size = len(rows) * bins
    counts = torch.bincount(index, minlength=size).to(rows.dtype)
    return torch.stack([counts.view(-1, bins), torch.bincount(index, offset.flatten(), size).view(-1, bins)], 1)


@functools.lru_cache(maxsize=8)
def _bound_table(
    levels: int, bins: int, candidates: int, exponent: float, both: bool, device: torch.device
) -> torch.Tensor:
    """Return (2 * bins, K): what a count and an offset sum of each bin add to the lower bounds, radius 1.

    Two-sided: bins over [-1, 1], zero point levels / 2 - 1. One-sided: bins over [0, 1], zero point 0.
    """
    i = torch.arange(1, candidates + 1, dtype=torch.float64)
    scale = (2.0 if both else 1.0) * i / candidates / (levels - 1)
    low = 1 - levels // 2 if both else 0
    edges = torch.linspace(-1.0 if both else 0.0, 1.0, bins + 1, dtype=torch.float64)[:, None] / scale
    middles, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]  # (bins, K), (K,), in steps

    def error(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        code = u.round().clamp(low, low + levels - 1)
        return u - code, code

    w, _ = error(middles)
    value, slope = w.abs().pow(exponent), exponent * w.sign() * w.abs().pow(exponent - 1)
    w, code = error(edges)
    ends = w.abs().pow(exponent)
    left, right = ends[:-1], ends[1:]
    boundary = code[1:] != code[:-1]
    chord, tangent = (right - left) / width, exponent * torch.minimum(w[1:].abs(), w[:-1].abs()).pow(exponent - 1)
    chord = torch.where(width < 0.5, chord.clamp(-tangent, tangent), 0.0)
    bottom = torch.where(width < 0.5, torch.minimum(left, right), 0.0)
    value = torch.where(boundary, bottom + chord.abs() * width / 2, value)
    slope = torch.where(boundary, chord, slope) * width
    return (torch.cat([value, slope]) * scale.pow(exponent)).to(device, torch.float32)

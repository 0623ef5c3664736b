"""Turn the shares of the steps into whole numbers of rows."""

from __future__ import annotations

import torch
from torch import Tensor


def allocate(share: Tensor, n: int) -> Tensor:
    """Distribute n rows over the steps in proportion to ``share``.

    share: float32 (T,), non-negative, sum 1. Rounds half to even; missing rows go one each to the steps with the
    *largest* rounded counts, excess rows are taken one each from the steps with the least noise, until the sum is n.
    Returns int64 (T,), never negative.
    Source: golden README 5.4. Deviations: equal counts are ordered by the lower step (official: an unstable sort), and
    the passes repeat until the sum fits (official: one pass, then an assertion; for LSUN-Church it could reach -1).
    """
    if n < 0 or not torch.isfinite(share).all():
        raise ValueError(f"cannot distribute {n} rows over shares {share.tolist()}")
    counts = (share * n).round().long()
    while (missing := n - int(counts.sum())) > 0:
        largest = torch.sort(counts, descending=True, stable=True).indices
        counts[largest[:missing]] += 1
    while (excess := int(counts.sum()) - n) > 0:
        late_first = counts.nonzero().flatten().flip(0)
        counts[late_first[:excess]] -= 1
    return counts

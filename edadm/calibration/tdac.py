"""TDAC, the temporal distribution-aware calibration of EDA-DM (eqs. 7 to 12; golden README 5).

Steps whose middle features have many near neighbours along the trajectory (density) and point elsewhere than those of
the other steps (variety) give more rows. The official double loop over pairs of steps is two matrix products here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from edadm.calibration.allocate import allocate
from edadm.calibration.rows import CalibrationSet, take
from edadm.calibration.trajectories import Trajectories
from edadm.errors import EdadmError

logger = logging.getLogger(__name__)

_BLOCK = 4096  # elements of a step per matrix product: bounds the float64 copies
_DIRECT_DOUBT = 1e-5  # the direct formula's float32 mean is off by less, relative to the distance
_GRAM_DOUBT = 1e-12  # the Gram distance is off by less, relative to the squared norms
_COSINE_EPS = 1e-6  # smallest norm, as the official cosine


@dataclass(frozen=True)
class TDAC:
    """Rows per step from density and variety of the features.

    threshold: r, mean squared difference below which two steps are neighbours (released code 3.0 or 0.3 by task); None
    takes the median of the pairwise distances, for networks without a published value. weight: lambda of the variety.
    """

    threshold: float | None = None
    weight: float = 1.2
    version: int = 1
    needs_features: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.weight < 0 or (self.threshold is not None and self.threshold < 0):
            raise EdadmError(f"TDAC: threshold {self.threshold} and weight {self.weight} must not be negative")

    def trajectories_needed(self, n: int, steps: int) -> int:
        """Return n."""
        return n

    @torch.no_grad()
    def select(
        self, trajectories: Trajectories, n: int, rng: np.random.Generator
    ) -> tuple[CalibrationSet, dict[str, Any]]:
        """Return n rows and the scores they come from; row j is of trajectory j at a step drawn without replacement.

        Raises EdadmError without features, when they are not finite, or when there are too few trajectories.
        """
        features = trajectories.features
        if features is None:
            raise EdadmError("TDAC needs features: collect the trajectories with a feature_module")
        if not all(torch.isfinite(step).all() for step in features):  # of all at once it makes copies of their size
            raise EdadmError("TDAC: the features hold NaN or Inf; sample the trajectories again in float32")
        near, r = density(features, self.threshold)
        apart = variety(features)
        share = shares(near, apart, self.weight)
        counts = allocate(share, n)
        slots = np.repeat(np.arange(trajectories.steps), counts.numpy())
        rows = take(trajectories, slots[rng.permutation(n)])
        return rows, {
            "threshold": r,
            "threshold_from": "median" if self.threshold is None else "given",
            "density": near.tolist(),
            "variety": apart.tolist(),
            "share": share.tolist(),
            "counts": counts.tolist(),
        }


def density(features: Tensor, threshold: float | None = None) -> tuple[Tensor, float]:
    """Return how many other steps lie within the threshold of each step, int64 (T,), and the threshold used.

    features: float32 (T, B, C, ...). Distance: mean squared difference over everything but the step. Distances come
    from a float64 Gram matrix; those so close to the threshold that float32 rounding decides are computed by the direct
    formula, so that the decisions are the official ones. threshold None: the median over all pairs.
    """
    steps, elements = len(features), features[0].numel()
    gram = torch.zeros(steps, steps, dtype=torch.float64)
    for block in _blocks(features):
        flat = block.double().flatten(1)
        flat -= flat.mean(dim=0)  # equal distances, smaller norms, less cancellation
        gram += flat @ flat.T
    norm = gram.diagonal()
    i, j = torch.triu_indices(steps, steps, offset=1)
    largest = (norm[i] + norm[j]) / elements
    pairs = largest - 2 * gram[i, j] / elements
    r = _median(pairs) if threshold is None else float(threshold)
    doubtful = (pairs - r).abs() <= _DIRECT_DOUBT * abs(r) + _GRAM_DOUBT * largest
    for close in doubtful.nonzero().flatten().tolist():
        pairs[close] = (features[i[close]] - features[j[close]]).square_().mean().double()
    if threshold is None:
        r = _median(pairs)
    near = (pairs <= r).long()
    count = torch.zeros(steps, dtype=torch.int64)
    return count.index_add_(0, i, near).index_add_(0, j, near), r


def variety(features: Tensor) -> Tensor:
    """Return the summed cosine distance of each step to all others, float64 (T,).

    features: float32 (T, B, C, ...). Cosines are taken along the channels (dim 2) at every position of every
    trajectory and 1 - cos is summed over positions, trajectories and the other steps. The sum over the steps is taken
    before the product, so no pair is ever formed.
    """
    steps = len(features)
    positions = features[0].numel() // features.shape[2]
    to_all = torch.zeros(steps, dtype=torch.float64)  # sum over j of cos, j = i included
    to_self = torch.zeros(steps, dtype=torch.float64)
    for block in _blocks(features):
        unit = block.double()
        unit /= unit.norm(dim=2, keepdim=True).clamp_(min=_COSINE_EPS)
        flat = unit.flatten(1)
        to_all += flat @ flat.sum(dim=0)
        to_self += flat.square_().sum(dim=1)
    most = (steps - 1) * positions
    apart = most - (to_all - to_self)
    return apart.where(apart > 1e-10 * most, torch.zeros(()))  # what rounding leaves of equal features


def shares(density: Tensor, variety: Tensor, weight: float) -> Tensor:
    """Return the share of each step, float32 (T,) with sum 1: scaled density + weight * scaled variety, normalised.

    A score that is equal for all steps counts as 0 (official: NaN); if nothing is left, all shares are equal.
    """
    score = _min_max(density.float(), "density") + weight * _min_max(variety.float(), "variety")
    total = score.sum()
    if total == 0:
        logger.warning("TDAC: no score tells the %d steps apart, each gives the same number of rows", len(score))
        return torch.full_like(score, 1 / len(score))
    return score / total


def _min_max(score: Tensor, name: str) -> Tensor:
    low, high = score.min(), score.max()
    if high - low <= 1e-6 * high.abs():  # equal up to the rounding of float32
        logger.warning("TDAC: the %s is the same (%g) at every step and is left out", name, float(low))
        return torch.zeros_like(score)
    return (score - low) / (high - low)


def _median(values: Tensor) -> float:
    return float(np.median(values.numpy())) if len(values) else 0.0


def _blocks(features: Tensor) -> Iterator[Tensor]:
    """Cut features along the trajectories into blocks of about _BLOCK elements a step."""
    return iter(features.split(max(_BLOCK // features[0, 0].numel(), 1), dim=1))

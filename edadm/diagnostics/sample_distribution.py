"""Which rows each calibration sampler takes, against the trajectories' own distribution (the paper's Figure 5).

A full-precision trajectory passes each step once, so its own distribution over the steps is flat; how it lies in the
space of middle features, averaged over positions, is seen along their two main axes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edadm import config
from edadm.calibration.rows import CalibrationSet
from edadm.calibration.trajectories import Trajectories
from edadm.diagnostics.inputs import Inputs
from edadm.diagnostics.samplers import row_sampler
from edadm.errors import EdadmError
from edadm.keys import Run
from edadm.sampling.noise import SELECTION, numpy_rng

SHOWN = 2000  # points that show the trajectories' own distribution
POOL = 4096  # rows that stand for all rows of the trajectories in distances
RANDOM_DRAWS = 20  # of as many rows, which show how far chance alone leads
FINGERPRINT = 16  # elements by which a row is found in its trajectory


def measure(inputs: Inputs) -> dict[str, Any]:
    """Return for each sampler its rows per step and where they lie, besides where the trajectories lie.

    ``distance``: energy distance between the features of the rows and those of the trajectories, as a share of the
    mean distance within the trajectories; ``by_chance`` holds that of as many rows drawn from all rows at random.
    ``total_variation``: half the summed difference of the counts' shares to equal shares of the steps.
    """
    run, along = inputs.run, inputs.trajectories
    n, seed = run.settings["profile.rows"], run.settings["seed"]
    space, features = described(along)
    plane = Plane.of(features.flatten(0, 1))
    pool = Pool(features.flatten(0, 1), seed)
    return {
        "n": {"rows": n, "trajectories": along.count, "steps": along.steps, "pool": len(pool.rows)},
        "space": space,
        "unit": {"counts": "rows", "distance": "share of the mean distance between rows of the trajectories"},
        "timesteps": along.timesteps.tolist(),
        "explained": plane.explained,
        "own": plane.project(features[:, : max(1, SHOWN // along.steps)]).tolist(),
        "by_chance": [pool.distance(pool.draw(n)) for _ in range(RANDOM_DRAWS)],
        "samplers": {
            name: _chosen(run, name, along, features, plane, pool, n) for name in config.options("calibration")
        },
    }


@dataclass(frozen=True)
class Plane:
    """The two axes of largest variance of some rows (N, C). explained: the share of the variance along each."""

    mean: Tensor
    axes: Tensor
    explained: list[float]

    @classmethod
    def of(cls, rows: Tensor) -> Plane:
        """Return the plane of rows (N, C) with C >= 2; the sign of an axis makes its largest entry positive."""
        centred = rows.double() - rows.double().mean(0)
        variances, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))
        axes = vectors[:, -2:].flip(1)
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        shares = (variances[-2:].flip(0) / variances.sum().clamp(min=1e-30)).tolist()
        return cls(rows.double().mean(0), axes, shares)

    def project(self, rows: Tensor) -> Tensor:
        """Return the coordinates (..., 2) of rows (..., C)."""
        return (rows.double() - self.mean) @ self.axes


class Pool:
    """Rows that stand for all rows of the trajectories, and the energy distance of others to them."""

    def __init__(self, rows: Tensor, seed: int):
        self._all, self._rng = rows.double(), numpy_rng("sample_distribution", seed)
        self.rows = self.draw(min(POOL, len(rows)))
        self.spread = float(torch.cdist(self.rows, self.rows).mean())

    def draw(self, n: int) -> Tensor:
        """Return n different rows drawn from all rows at random."""
        return self._all[torch.from_numpy(self._rng.choice(len(self._all), min(n, len(self._all)), replace=False))]

    def distance(self, rows: Tensor) -> float:
        """Return 2 E|X - Y| - E|X - X'| - E|Y - Y'| of rows X to the pool Y, divided by the last (Szekely, Rizzo)."""
        rows = rows.double()
        between, within = torch.cdist(rows, self.rows).mean(), torch.cdist(rows, rows).mean()
        return float(2 * between - within - self.spread) / self.spread


def _chosen(
    run: Run, name: str, along: Trajectories, features: Tensor, plane: Plane, pool: Pool, n: int
) -> dict[str, Any]:
    """Return what one sampler chooses with the run's seed, or why it cannot choose from these trajectories."""
    rng = numpy_rng(SELECTION, run.settings["seed"])
    try:
        rows, notes = row_sampler(run, name).select(along, n, rng)
    except EdadmError as error:
        return {"reason": str(error)}
    chosen = features[rows.step, source_trajectories(along, rows)]
    share = np.asarray(notes["counts"]) / n
    return {
        "counts": notes["counts"],
        "total_variation": float(np.abs(share - 1 / along.steps).sum() / 2),
        "distance": pool.distance(chosen),
        "points": plane.project(chosen).tolist(),
        "steps": rows.step.tolist(),
    }


def source_trajectories(along: Trajectories, rows: CalibrationSet) -> Tensor:
    """Return the number of the trajectory that each row was taken from, int64 (n,)."""
    prints = along.x.flatten(2)[..., :FINGERPRINT]
    found = [
        int((prints[step] == row).all(1).nonzero()[0])
        for step, row in zip(rows.step.tolist(), rows.x.flatten(1)[:, :FINGERPRINT], strict=True)
    ]
    return torch.tensor(found)


def described(along: Trajectories) -> tuple[str, Tensor]:
    """Return what describes a row in words, and as float32 (T, N, C).

    That are the middle features averaged over positions; where a trajectory has none of its own (guidance doubles
    them, latent tasks keep those of the first batch), the network input averaged over a 4 x 4 grid.
    """
    if along.features is not None and along.features.shape[1] == along.count:
        features = along.features
        return "middle features", features.flatten(3).mean(3) if features.dim() > 3 else features
    coarse = F.adaptive_avg_pool2d(along.x.flatten(0, 1), 4)
    return "network inputs", coarse.flatten(1).unflatten(0, along.x.shape[:2])

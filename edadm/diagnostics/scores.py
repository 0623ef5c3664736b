"""TDAC's two scores beside what they are meant to follow (the paper's Figure 11).

Density is set beside the share of rows that NDTC takes at each step, variety beside the quantization loss of the whole
network at that step.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr

from edadm.calibration.tdac import density, variety
from edadm.calibration.trajectories import Trajectories
from edadm.diagnostics.inputs import Inputs
from edadm.diagnostics.samplers import row_sampler
from edadm.errors import EdadmError
from edadm.sampling.noise import numpy_rng

DRAWS = 10_000  # from which the share of each step under NDTC is estimated, to about 0.2 %
PAIRS = (
    ("density", "ndtc"),
    ("variety", "loss"),
    ("density", "loss"),
    ("variety", "ndtc"),
    ("variety", "relative_loss"),
)


def measure(inputs: Inputs) -> dict[str, Any]:
    """Return the curves over the T steps in sampling order, and the correlations between them.

    ``loss``: mean squared error of the run's noise prediction on full-precision trajectories of the evaluation noise;
    ``relative_loss``: the same over the mean square of the prediction. ``correlations`` are over the T steps, which are
    no independent samples: they say how alike two curves are, not how significant that is.
    """
    run, along, errors = inputs.run, inputs.trajectories, inputs.step_errors
    assert along.features is not None
    near, threshold = density(along.features, row_sampler(run, "tdac").threshold)
    steps = torch.tensor(list(run.sampler.step_of_call))
    error, signal = (by_step(part, steps) for part in (errors.error, errors.signal))
    curves = {
        "density": near.tolist(),
        "variety": variety(along.features).tolist(),
        "ndtc": step_shares(row_sampler(run, "normal"), along.steps),
        "loss": (error / math.prod(run.task.sample_shape)).tolist(),
        "relative_loss": (error / signal).tolist(),
    }
    return {
        "n": {
            "steps": along.steps,
            "feature trajectories": along.features.shape[1],
            "loss trajectories": errors.error.shape[1],
        },
        "unit": {
            "density": "steps within the threshold",
            "variety": "summed cosine distance to the other steps",
            "ndtc": "share of the rows",
            "loss": "mean squared error of the noise prediction",
            "relative_loss": "share of the mean square of the noise prediction",
        },
        "timesteps": along.timesteps.tolist(),
        "threshold": threshold,
        "curves": curves,
        "correlations": [correlation(curves, *pair) for pair in PAIRS],
    }


def by_step(energy: np.ndarray, steps: torch.Tensor) -> torch.Tensor:
    """Return energies (calls, trajectories) as the mean over the calls and trajectories of every step, float64 (T,)."""
    of_calls = torch.from_numpy(energy).mean(1)
    total = torch.zeros(int(steps.max()) + 1, dtype=torch.float64)
    return total.index_add(0, steps, of_calls) / torch.bincount(steps)


def step_shares(sampler: Any, steps: int) -> list[float]:
    """Return the share of rows that a sampler which needs no features takes at each of ``steps`` network calls."""
    if sampler.needs_features:
        raise EdadmError(f"{type(sampler).__name__} has no share of the steps without features")
    blank = Trajectories(torch.zeros(steps, DRAWS, 1), torch.arange(steps).flip(0))
    rows, _ = sampler.select(blank, DRAWS, numpy_rng("step_shares", 0))
    return (torch.bincount(rows.step, minlength=steps) / DRAWS).tolist()


def correlation(curves: dict[str, list[float]], one: str, other: str) -> dict[str, Any]:
    """Return Pearson's and Spearman's coefficients of two curves, None where one of them is constant."""
    found: dict[str, Any] = {"of": [one, other], "pearson": None, "spearman": None}
    if min(len(set(curves[one])), len(set(curves[other]))) > 1:
        found["pearson"] = float(pearsonr(curves[one], curves[other]).statistic)
        found["spearman"] = float(spearmanr(curves[one], curves[other]).statistic)
    return found

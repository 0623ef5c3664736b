from __future__ import annotations

import numpy as np
import pytest
import torch

from baselines.ptq4dm import Normal
from edadm.calibration.trajectories import Trajectories
from edadm.errors import EdadmError
from edadm.sampling.noise import SELECTION, numpy_rng


@pytest.fixture
def trajectories() -> Trajectories:
    """100 steps of 4000 trajectories; x is the number of the step."""
    x = torch.arange(100.0).view(-1, 1, 1).expand(100, 4000, 1)
    return Trajectories(x, torch.arange(990, -1, -10))


def draws(mean: float, std: float, total: int, n: int) -> np.ndarray:
    """generate_t of the official code: int() truncates toward zero."""
    normal = numpy_rng(SELECTION, 0).normal(mean, std, n)
    return np.array([min(max(int(v * total), 0), total - 1) for v in normal])


def test_rows_are_clamped_normal_draws_at_their_own_timestep(trajectories):
    chosen, _ = Normal().select(trajectories, 4000, numpy_rng(SELECTION, 0))
    t = draws(0.4, 0.4, 100, 4000)
    assert np.array_equal(chosen.step.numpy(), 99 - t)
    assert np.array_equal(chosen.timestep.numpy(), t * 10)  # the bug of the official code would give 990 - 10 t
    assert torch.equal(chosen.x.flatten().long(), chosen.step)


def test_the_mean_lies_on_the_low_noise_side(trajectories):
    chosen, diagnostics = Normal().select(trajectories, 4000, numpy_rng(SELECTION, 0))
    assert chosen.timestep.float().mean() < 500
    # methods.md 1.3: 15.9 % of the mass is clamped to t = 0, 6.7 % to T - 1; four standard deviations
    assert diagnostics["counts"][-1] / 4000 == pytest.approx(0.159, abs=0.03)
    assert diagnostics["counts"][0] / 4000 == pytest.approx(0.067, abs=0.02)


def test_mean_and_std_are_used(trajectories):
    chosen, _ = Normal(mean=0.9, std=0.0).select(trajectories, 5, numpy_rng(SELECTION, 0))
    assert chosen.step.tolist() == [9] * 5


def test_a_negative_deviation_is_an_error():
    with pytest.raises(EdadmError, match="standard deviation"):
        Normal(std=-1)

from __future__ import annotations

import numpy as np
import torch

from edadm.calibration.random import Random
from edadm.calibration.trajectories import Trajectories
from edadm.sampling.noise import SELECTION, numpy_rng


def test_steps_are_uniform_and_every_trajectory_gives_one_row():
    steps, n = 10, 5000
    x = torch.arange(n).float().expand(steps, n)[:, :, None].contiguous()
    chosen, diagnostics = Random().select(Trajectories(x, torch.arange(steps).flip(0)), n, numpy_rng(SELECTION, 0))
    assert chosen.x.flatten().tolist() == list(range(n))
    # 500 expected, standard deviation 21: five of them
    assert np.abs(np.array(diagnostics["counts"]) - n / steps).max() < 107

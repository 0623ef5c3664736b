from __future__ import annotations

import pytest
import torch

from edadm.calibration.trajectories import Trajectories


@pytest.fixture
def trajectories() -> Trajectories:
    """10 steps of 24 trajectories; x says which step and trajectory it is of."""
    steps, count = 10, 24
    x = torch.empty(steps, count, 2, 1, 1)
    x[:, :, 0] = torch.arange(steps).view(-1, 1, 1, 1)
    x[:, :, 1] = torch.arange(count).view(1, -1, 1, 1)
    walk = torch.randn(steps, count, 8, 2, 2, generator=torch.Generator().manual_seed(0)).cumsum(0)
    return Trajectories(x, torch.arange(900, -1, -100), walk)

from __future__ import annotations

import pytest
import torch

from edadm.quant.calibrate import set_activation_ranges, set_weight_ranges
from edadm.quant.network import Bits, QuantModel
from edadm.quant.ranges import MSE
from tests.toys import tiny_unet

ROWS = 12


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Calibration rows: x (ROWS, 3, 8, 8) and timesteps (ROWS,)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 3, 8, 8, generator=generator), torch.arange(ROWS) * 80


@pytest.fixture
def make_network(rows):
    """Build the toy network with weight ranges, and activation ranges unless told otherwise."""

    def make(bits: Bits = Bits(4, 8), ranges: bool = True) -> QuantModel:  # noqa: B008
        network = QuantModel.wrap(tiny_unet(), bits)
        set_weight_ranges(network, MSE())
        if ranges:
            set_activation_ranges(network, MSE(), [lambda: network(*rows)])
        return network

    return make

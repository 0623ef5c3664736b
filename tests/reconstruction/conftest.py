from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from edadm.quant.calibrate import set_activation_ranges, set_weight_ranges
from edadm.quant.network import Bits, QuantModel
from edadm.quant.ranges import MSE
from tests.toys import tiny_unet

ROWS = 12


def calibration_rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(ROWS, 3, 8, 8, generator=generator), torch.arange(ROWS) * 80


def build_network(bits: Bits, ranges: bool) -> QuantModel:
    network = QuantModel.wrap(tiny_unet(), bits)
    set_weight_ranges(network, MSE())
    if ranges:
        set_activation_ranges(network, MSE(), [lambda: network(*calibration_rows())])
    return network


@pytest.fixture
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Calibration rows: x (ROWS, 3, 8, 8) and timesteps (ROWS,)."""
    return calibration_rows()


@pytest.fixture(scope="session")
def make_network() -> Callable[..., QuantModel]:
    """Return the toy network with weight ranges, and activation ranges unless told otherwise.

    Each is a copy of one that is built once: the search of the ranges takes longer than most tests.
    """
    built: dict[tuple[Bits, bool], QuantModel] = {}

    def make(bits: Bits = Bits(4, 8), ranges: bool = True) -> QuantModel:  # noqa: B008
        if (bits, ranges) not in built:
            built[bits, ranges] = build_network(bits, ranges)
        network = built[bits, ranges]
        return copy.deepcopy(network, {id(network.plan): network.plan})  # frozen, and no type that can be copied

    return make

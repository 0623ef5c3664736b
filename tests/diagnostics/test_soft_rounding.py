from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from edadm.diagnostics.inputs import Inputs
from edadm.diagnostics.soft_rounding import changed, measure
from edadm.keys import Run
from edadm.progress import Progress
from edadm.quant.layers import LayerBits, QuantLayer

Toy = Callable[..., Run]


@pytest.fixture
def layer() -> QuantLayer:
    """A layer of step 1 and zero point 8 with weights 0.2, 0.7, 1.4, -2.6 and one beyond the grid."""
    source = nn.Linear(5, 1, bias=False)
    source.weight.data = torch.tensor([[0.2, 0.7, 1.4, -2.6, 20.0]])
    layer = QuantLayer(source, "layer", "role", LayerBits(4, 8))
    layer.weight_quantizers[0].set(torch.tensor([1.0]), torch.tensor([8.0]))
    return layer


def finished(layer: QuantLayer, up: list[bool]) -> QuantLayer:
    layer.weight_quantizers[0].hard_up = torch.tensor([up])
    layer.invalidate()
    return layer


def test_codes_that_are_not_the_nearest_are_counted(layer: QuantLayer) -> None:
    weight = layer.weight.clone()
    assert changed(layer, weight) == (0, 5)
    assert changed(finished(layer, [False, True, False, False, True]), weight) == (0, 5)
    assert changed(finished(layer, [True, True, False, True, True]), weight) == (2, 5)
    # the clamp gives the largest code whichever way the weight beyond the grid is rounded
    assert changed(finished(layer, [True, False, True, True, False]), weight) == (4, 5)


def test_a_layer_in_floating_point_has_no_codes() -> None:
    assert changed(QuantLayer(nn.Linear(2, 2), "layer", "role", LayerBits(32, 8)), torch.zeros(2, 2)) == (0, 0)


def test_a_small_step_leaves_the_rounding_soft_and_large_ones_with_the_regulariser_decide_it(toy: Toy) -> None:
    soft = measure(
        Inputs(
            toy("method=edadm", "reconstruction=block", "recipe.lr_weight=1e-6", "profile.iterations=1"),
            Progress("toy"),
        )
    )
    words = ("reconstruction=block", "recipe.lr_weight=2", "optimization.reg_weight=1", "profile.iterations=25")
    decided = measure(Inputs(toy("method=edadm", *words), Progress("toy")))
    assert soft["undecided"] > 0.8 and soft["changed"] < 0.01
    assert decided["undecided"] < 0.1 < decided["changed"] < 0.9
    assert soft["n"]["weights"] == sum(unit["weights"] for unit in soft["units"])
    assert (soft["n"]["iterations"], decided["n"]["iterations"]) == (1, 25)


def test_two_phases_count_the_phase_that_rounds(toy: Toy) -> None:
    values = measure(Inputs(toy("method=qdiffusion"), Progress("toy")))
    assert {unit["phase"] for unit in values["units"]} == {"weights"}
    assert values["regulariser"] == 0.01

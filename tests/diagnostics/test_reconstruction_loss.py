from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from edadm.calibration.rows import CalibrationSet
from edadm.calibration.trajectories import Trajectories
from edadm.diagnostics.inputs import Inputs
from edadm.diagnostics.reconstruction_loss import (
    Networks,
    comparison,
    first_rows,
    measure,
    part_losses,
    row_losses,
    rows_at_steps,
    summary,
)
from edadm.errors import EdadmError
from edadm.keys import Run
from edadm.progress import Progress
from edadm.quant.calibrate import set_activation_ranges, set_weight_ranges
from edadm.quant.network import Bits, QuantModel
from edadm.quant.ranges import MSE
from edadm.reconstruction.objective import tensor_loss
from tests.toys import tiny_unet

Toy = Callable[..., Run]


@pytest.fixture(scope="module")
def rows() -> CalibrationSet:
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return CalibrationSet(x, torch.arange(6) * 150, torch.arange(6))


def quantized(rows: CalibrationSet, bits: Bits) -> QuantModel:
    network = QuantModel.wrap(tiny_unet(), bits)
    set_weight_ranges(network, MSE())
    set_activation_ranges(network, MSE(), [lambda: network(rows.x, rows.timestep)])
    return network


def measured(rows: CalibrationSet, before: QuantModel, after: QuantModel) -> list[dict]:
    """The losses with the first four rows as training rows and the others held out."""
    full = QuantModel.wrap(tiny_unet(), before.bits)
    held_out = CalibrationSet(rows.x[4:], rows.timestep[4:], rows.step[4:])
    return part_losses(Networks(full, before, after), first_rows(rows, 4), held_out, Progress("toy"))


def losses(rows: CalibrationSet, before: Bits, after: Bits) -> list[dict]:
    return measured(rows, quantized(rows, before), quantized(rows, after))


def test_the_mean_of_row_losses_is_the_loss_of_the_reconstruction() -> None:
    output, target = torch.randn(2, 5, 4, 3, 3).unbind()
    assert row_losses(output, target, 4).mean().item() == pytest.approx(tensor_loss(output, target, 4, 2.0).item())


def test_a_ratio_has_an_interval_over_rows() -> None:
    before, after = torch.tensor([2.0, 4.0, 6.0]).double(), torch.tensor([1.0, 2.0, 6.0]).double()
    found = comparison(before, after)
    assert (found["before"], found["after"], found["ratio"]) == (4.0, 3.0, 0.75)
    residual = torch.tensor([1 - 1.5, 2 - 3.0, 6 - 4.5])
    width = 1.96 * residual.std().item() / math.sqrt(3) / 4
    assert found["interval"] == pytest.approx([0.75 - width, 0.75 + width])
    assert comparison(torch.zeros(3), after)["ratio"] is None


def test_an_equal_network_has_ratio_one_everywhere(rows: CalibrationSet) -> None:
    parts = losses(rows, Bits(4, 8), Bits(4, 8))
    for part in parts:
        for kind in ("training", "held_out"):
            assert part[kind]["ratio"] == pytest.approx(1, abs=1e-4)
    assert len({(part["unit"], part["part"]) for part in parts}) == len(parts)


def test_more_bits_lower_every_loss(rows: CalibrationSet) -> None:
    parts = losses(rows, Bits(2, 8), Bits(8, 8))
    assert all(part["training"]["ratio"] < 1 for part in parts)
    found = summary(parts)
    assert found["block outputs"]["training"]["lower"] == found["block outputs"]["training"]["parts"] > 0
    assert found["front layers"]["held_out"]["ratio"] < 0.2


def test_the_loss_before_is_that_of_the_unit_alone(rows: CalibrationSet) -> None:
    before, full = quantized(rows, Bits(2, 8)), QuantModel.wrap(tiny_unet(), Bits(2, 8))
    parts = measured(rows, before, quantized(rows, Bits(4, 8)))
    part = next(part for part in parts if part["unit"] == "conv_in")
    with torch.no_grad():
        outputs = [network.layers["conv_in"](rows.x) for network in (before, full)]
    expected = (outputs[0] - outputs[1]).square().sum(1).flatten(1).mean(1)
    assert part["training"]["before"] == pytest.approx(expected[:4].mean().item(), rel=1e-4)
    assert part["held_out"]["before"] == pytest.approx(expected[4:].mean().item(), rel=1e-4)


def test_front_layers_are_those_of_a_block_that_do_not_end_it(rows: CalibrationSet) -> None:
    parts = losses(rows, Bits(4, 8), Bits(4, 8))
    block = {part["part"]: part["front"] for part in parts if part["unit"] == "up_blocks.0.resnets.0"}
    assert block == {"output": False, "conv1": True, "time_emb_proj": True, "conv2": False, "conv_shortcut": True}
    assert [part["part"] for part in parts if part["unit"] == "conv_in"] == ["output"]


def test_rows_are_taken_at_the_steps_asked_for_and_trajectories_take_turns() -> None:
    along = Trajectories(torch.arange(3.0 * 4).reshape(3, 4, 1), torch.tensor([900, 500, 100]))
    steps = torch.tensor([0, 0, 2, 0, 0, 2, 0])
    rows, numbers = rows_at_steps(along, steps)
    assert rows.x.flatten().tolist() == [int(step) * 4 + number for step, number in zip(steps, numbers)]
    assert rows.timestep.tolist() == along.timesteps[steps].tolist()
    assert sorted(numbers[i] for i in (0, 1, 3, 4)) == [0, 1, 2, 3]
    assert numbers[2] != numbers[5]
    with pytest.raises(EdadmError, match="come from step 4, the sampler has 3"):
        rows_at_steps(along, torch.tensor([3]))


def test_held_out_rows_are_not_the_training_rows(toy: Toy) -> None:
    run = toy("method=edadm", "reconstruction=block", "profile.iterations=10")
    inputs = Inputs(run, Progress("toy"))
    training = inputs.calibration_rows
    held_out, numbers = rows_at_steps(inputs.held_out_trajectories, training.step)
    assert torch.cdist(training.x.flatten(1), held_out.x.flatten(1)).min() > 0.1
    assert held_out.timestep.tolist() == training.timestep.tolist()
    values = measure(inputs)
    assert values["n"] == {"training rows": 8, "held-out rows": 8, "held-out trajectories": len(set(numbers))}
    part = next(part for part in values["parts"] if part["unit"] == "mid_block.resnets.0" and part["part"] == "output")
    assert part["training"]["before"] != part["held_out"]["before"]
    assert values["summary"]["block outputs"]["training"]["ratio"] < 1

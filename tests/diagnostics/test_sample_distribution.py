from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from edadm import config
from edadm.calibration.rows import take
from edadm.calibration.trajectories import Trajectories
from edadm.diagnostics.inputs import Inputs
from edadm.diagnostics.sample_distribution import Plane, Pool, described, measure, source_trajectories
from edadm.keys import Run
from edadm.progress import Progress

Toy = Callable[..., Run]


def test_the_plane_holds_the_axes_of_largest_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2000, 4, generator=generator) * torch.tensor([0.1, 3.0, 0.0, 1.0]) + 5
    plane = Plane.of(rows)
    assert plane.axes.abs()[1, 0] > 0.99 and plane.axes.abs()[3, 1] > 0.99
    assert plane.explained == pytest.approx([0.9, 0.1], abs=0.02)
    assert plane.project(rows).mean(0).tolist() == pytest.approx([0, 0], abs=1e-4)


def test_the_energy_distance_grows_with_the_shift() -> None:
    rows = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    pool = Pool(rows, 0)
    assert pool.distance(rows) == pytest.approx(0, abs=1e-6)
    near, far = pool.distance(rows[:100]), pool.distance(rows[:100] + 1)
    assert 0 < near < 0.05 < far


def test_the_energy_distance_of_two_points_by_hand() -> None:
    pool = Pool(torch.tensor([[0.0], [2.0]]), 0)
    # to the point 0: E|X-Y| = 1, E|X-X'| = 0, E|Y-Y'| = 1
    assert pool.distance(torch.tensor([[0.0]])) == pytest.approx(1.0)


def test_rows_are_traced_to_their_trajectories() -> None:
    along = Trajectories(torch.randn(5, 7, 3, 4, 4), torch.arange(5).flip(0))
    numbers = torch.tensor([3, 3, 0, 6])
    rows = take(along, torch.tensor([4, 0, 2, 4]).numpy(), numbers.numpy())
    assert source_trajectories(along, rows).tolist() == numbers.tolist()


def test_every_sampler_gives_its_rows_and_an_even_one_has_no_variation(toy: Toy) -> None:
    run = toy("method=rtn")
    values = measure(Inputs(run, Progress("toy")))
    assert list(values["samplers"]) == config.options("calibration")
    for found in values["samplers"].values():
        assert sum(found["counts"]) == 8 == len(found["points"]) == len(found["steps"])
        assert found["counts"] == torch.bincount(torch.tensor(found["steps"]), minlength=4).tolist()
        assert 0 <= found["total_variation"] < 1
    assert values["samplers"]["uniform"]["total_variation"] == 0
    assert sum(map(len, values["own"])) == 4 * 8
    assert all(distance > 0 for distance in values["by_chance"])


def test_the_rows_are_those_the_run_calibrates_on(toy: Toy) -> None:
    inputs = Inputs(toy("method=edadm", "seed=3"), Progress("toy"))
    assert measure(inputs)["samplers"]["tdac"]["steps"] == inputs.calibration_rows.step.tolist()


def test_rows_without_features_of_their_own_are_described_by_the_network_input() -> None:
    x = torch.rand(5, 7, 3, 8, 8)
    space, rows = described(Trajectories(x, torch.arange(5).flip(0), torch.rand(5, 2, 6, 4, 4)))
    assert (space, rows.shape) == ("network inputs", (5, 7, 3 * 16))
    assert rows[2, 3, 0] == pytest.approx(x[2, 3, 0, :2, :2].mean().item())
    features = torch.rand(5, 7, 6, 4, 4)
    space, rows = described(Trajectories(x, torch.arange(5).flip(0), features))
    assert space == "middle features" and torch.allclose(rows, features.mean((3, 4)))

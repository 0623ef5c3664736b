from __future__ import annotations

import pytest

from edadm.calibration.uniform import Uniform
from edadm.errors import EdadmError
from edadm.sampling.noise import SELECTION, numpy_rng


@pytest.mark.parametrize(
    ("steps", "total", "expected"),
    [
        (20, 100, list(range(0, 100, 5))),
        (20, 20, list(range(20))),
        (20, 10, list(range(10))),
        (20, 50, list(range(0, 50, 2))),  # 25: 20 does not divide 50
        (1, 10, [0]),
    ],
)
def test_evenly_spaced_steps(steps, total, expected):
    assert list(Uniform(steps).chosen(total)) == expected


def test_the_earliest_steps_give_the_remainder(trajectories):
    _, diagnostics = Uniform(steps=5).select(trajectories, 23, numpy_rng(SELECTION, 0))
    assert diagnostics["counts"] == [5, 0, 5, 0, 5, 0, 4, 0, 4, 0]


def test_the_same_first_trajectories_at_every_step(trajectories):
    chosen, _ = Uniform(steps=5).select(trajectories, 20, numpy_rng(SELECTION, 0))
    for k in range(0, 10, 2):
        assert sorted(chosen.x[chosen.step == k, 1].flatten().tolist()) == [0, 1, 2, 3]


def test_rows_are_shuffled(trajectories):
    chosen, _ = Uniform(steps=5).select(trajectories, 20, numpy_rng(SELECTION, 0))
    assert chosen.step.tolist() != sorted(chosen.step.tolist())


@pytest.mark.parametrize(("n", "total", "needed"), [(1024, 100, 52), (1024, 50, 41), (5120, 20, 256), (3, 20, 1)])
def test_trajectories_needed(n, total, needed):
    assert Uniform().trajectories_needed(n, total) == needed


def test_no_step_is_an_error():
    with pytest.raises(EdadmError, match="0 steps"):
        Uniform(steps=0)

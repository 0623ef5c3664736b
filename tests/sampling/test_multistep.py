from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edadm.errors import EdadmError
from edadm.sampling.latent import PLMS, LatentDDIM
from edadm.sampling.multistep import DPMSolver, DPMSolverPP, UniPC
from edadm.sampling.schedule import exact_alphas_cumprod

X = torch.linspace(-2, 2, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
SIGNAL = exact_alphas_cumprod()
SPREAD = 0.5  # standard deviation of the data


def signal(t: float) -> float:
    return math.exp(np.interp(t, np.arange(1000), SIGNAL.log().numpy()))


def gaussian_noise(x, t):
    """The exact noise of normally distributed data, for which the probability flow only rescales x."""
    a = signal(float(t[0]))
    return math.sqrt(1 - a) * x / (a * SPREAD**2 + 1 - a)


def scale_of(t: float) -> float:
    a = signal(t)
    return math.sqrt(a * SPREAD**2 + 1 - a)


def error(sampler) -> float:
    """The relative distance from the exact flow after half of the steps; the last steps are too long for any order."""
    states = {}
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    sampler.run(gaussian_noise, x, observe=lambda k, t, x, eps: states.setdefault(sampler.step_of_call[k], (t, x)))
    t, x = states[len(states) // 2]
    return abs(float(x) * scale_of(float(sampler.timesteps[0])) / scale_of(float(t)) - 1)


@pytest.mark.parametrize(
    ("make", "order"),
    [
        (lambda n: LatentDDIM(steps=n), 1),
        (DPMSolver, 2),
        (lambda n: DPMSolverPP(n, order=1), 1),
        (lambda n: DPMSolverPP(n, order=2), 2),
        (lambda n: UniPC(n, order=2), 2),
    ],
    ids=["ddim", "dpm_solver", "dpm_solver_pp_1", "dpm_solver_pp_2", "unipc"],
)
def test_twice_the_steps_divide_the_error_by_the_order_of_the_solver(make, order):
    coarse, fine = error(make(20)), error(make(40))
    assert coarse / fine >= 0.8 * 2**order, (coarse, fine)


def test_higher_orders_are_closer_to_the_exact_flow():
    first, second = error(DPMSolverPP(20, order=1)), error(DPMSolverPP(20, order=2))
    third, corrected = error(DPMSolverPP(20, order=3)), error(UniPC(20, order=2))
    assert third < second < first and corrected < second
    assert error(PLMS(steps=20)) < error(LatentDDIM(steps=20)) / 10


def test_times_are_fractional_as_in_the_original():
    assert DPMSolver(20).timesteps[:3] == pytest.approx([999, 949.05, 899.1], abs=1e-4)
    assert all(isinstance(t, float) and t == float(np.float32(t)) for t in DPMSolver(20).timesteps)


def test_whole_times_start_at_the_noisiest():
    for sampler in (DPMSolverPP(4), UniPC(4)):
        assert sampler.timesteps == [999, 749, 500, 250]


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize(("ours", "theirs"), [(DPMSolverPP, "DPMSolverMultistep"), (UniPC, "UniPCMultistep")])
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
def test_a_run_equals_a_loop_over_the_scheduler(ours, theirs, order, steps):
    import diffusers

    config = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "solver_order": order}
    scheduler = getattr(diffusers, f"{theirs}Scheduler")(**config)
    scheduler.set_timesteps(steps)
    sampler, x = ours(steps, order), X
    assert sampler.timesteps == scheduler.timesteps.tolist()
    for t in scheduler.timesteps:
        x = scheduler.step(x.sin() * t / 1000, t, x).prev_sample
    end = sampler.run(lambda x, t: x.sin() * t.view(-1, 1, 1, 1) / 1000, X)
    torch.testing.assert_close(end, x, rtol=1e-4, atol=1e-4)  # their betas are rounded


def test_one_step_goes_straight_to_the_predicted_sample():
    a, b = float(SIGNAL[999]), float(SIGNAL[0])
    eps = X.sin()
    x0 = (X - math.sqrt(1 - a) * eps) / math.sqrt(a)
    for sampler in (DPMSolverPP(1), UniPC(1)):
        torch.testing.assert_close(sampler.run(lambda x, t: eps, X), x0, rtol=1e-5, atol=1e-4)
    end = DPMSolver(1).run(lambda x, t: eps, X)
    torch.testing.assert_close(end, math.sqrt(b) * x0 + math.sqrt(1 - b) * eps, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("sampler", [DPMSolver, DPMSolverPP, UniPC])
@pytest.mark.parametrize("steps", [0, 1000])
def test_impossible_numbers_of_steps_are_named(sampler, steps):
    with pytest.raises(EdadmError, match=f"{steps} steps: choose 1 to 999"):
        sampler(steps)


@pytest.mark.parametrize("sampler", [DPMSolverPP, UniPC])
def test_impossible_orders_are_named(sampler):
    with pytest.raises(EdadmError, match="order 4"):
        sampler(order=4)


@pytest.mark.parametrize(
    ("sampler", "pinned"),
    [
        (DPMSolver(5), [-102.27222, -100.65571, -96.748734, -92.567421]),
        (DPMSolverPP(5), [-102.28771, -100.61906, -96.729790, -92.615967]),
        (UniPC(5), [-104.26512, -103.68250, -102.06668, -96.261635]),
    ],
)
def test_a_run_is_pinned(sampler, pinned):
    """Other values mean other images for every record: raise the sampler's version with the pin."""
    end = sampler.run(lambda x, t: x.sin() * t.view(-1, 1, 1, 1) / 800, X)
    assert sampler.version == 1
    torch.testing.assert_close(end[0, 0, 0], torch.tensor(pinned), rtol=1e-4, atol=0)

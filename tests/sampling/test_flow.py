from __future__ import annotations

import math

import diffusers
import pytest
import torch

from edadm.errors import EdadmError
from edadm.sampling.flow import FlowEuler, dynamic_shift, shifted

X = torch.linspace(-2, 2, 2 * 3 * 4 * 4, dtype=torch.float64).reshape(2, 3, 4, 4)


def velocity(x, t):
    return x.sin() + t.reshape(-1, 1, 1, 1) / 500


def test_noise_levels_by_hand():
    assert FlowEuler(4, shift=1.0).sigmas.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    # shift 3 moves 3/4 to 9/10, 1/2 to 3/4 and 1/4 to 1/2
    assert FlowEuler(4, shift=3.0).sigmas.tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0], rel=1e-6)
    assert FlowEuler(4, 3.0, time_scale=1.0).timesteps == pytest.approx([1.0, 0.9, 0.75, 0.5], rel=1e-6)
    assert FlowEuler(4, 3.0).timesteps == pytest.approx([1000, 900, 750, 500], rel=1e-6)
    # SD3: evenly spaced in the shifted levels of the training and shifted again
    last = shifted(1 / 1000, 3.0)
    levels = FlowEuler(3, 3.0, last_sigma=last).sigmas.tolist()
    assert levels == pytest.approx([1, shifted((1 + last) / 2, 3.0), shifted(last, 3.0), 0], rel=1e-6)


def test_the_shift_of_an_image_size_grows_exponentially_with_its_tokens():
    assert dynamic_shift(256) == pytest.approx(math.exp(0.5)) and dynamic_shift(4096) == pytest.approx(math.exp(1.15))
    assert dynamic_shift(2176) == pytest.approx(math.exp((0.5 + 1.15) / 2))


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_run_equals_a_loop_over_the_scheduler(steps, shift):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    sampler, x = FlowEuler(steps, shift, scheduler.sigma_min if steps > 1 else 1.0), X.float()
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, t), t, x).prev_sample
    assert sampler.timesteps == pytest.approx(scheduler.timesteps.tolist(), rel=1e-6)
    torch.testing.assert_close(sampler.run(velocity, X.float()), x, rtol=1e-5, atol=1e-5)


def test_a_straight_flow_ends_at_its_sample_in_any_number_of_steps():
    """Where the velocity is noise - x0 all along, Euler's steps are exact."""
    x0, noise = X.flip(0), X.cos()
    for sampler in (FlowEuler(1), FlowEuler(7, 3.0, 0.01, 1.0)):
        end = sampler.run(lambda x, t: noise - x0, noise)
        torch.testing.assert_close(end, x0, rtol=0, atol=1e-6)  # noise levels are float32


def test_tokens_of_a_transformer_are_samples_as_well():
    x = torch.linspace(-1, 1, 2 * 5 * 3).view(2, 5, 3)
    end = FlowEuler(3).run(lambda x, t: x.sin(), x)
    assert end.shape == x.shape and not torch.equal(end, x)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"steps": 0}, "0 steps"),
        ({"shift": 0.0}, "shift of the noise levels is 0"),
        ({"last_sigma": 2.0}, "last_sigma is 2"),
    ],
)
def test_settings_are_checked_at_once(numbers, message):
    with pytest.raises(EdadmError, match=message):
        FlowEuler(**numbers)


def test_a_run_is_pinned():
    """Other values mean other images for every record: raise the version of `FlowEuler` with the pin."""
    end = FlowEuler(5).run(velocity, X.float())
    assert FlowEuler().version == 1
    torch.testing.assert_close(
        end[0, 0, 0], torch.tensor([-2.546607, -2.471083, -2.397972, -2.327282]), rtol=1e-5, atol=0
    )

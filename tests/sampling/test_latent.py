from __future__ import annotations

import math

import pytest
import torch

from edadm.errors import EdadmError
from edadm.sampling.latent import PLMS, LatentDDIM
from edadm.sampling.schedule import exact_alphas_cumprod

X = torch.linspace(-2, 2, 2 * 3 * 4 * 4, dtype=torch.float64).reshape(2, 3, 4, 4)
SIGNAL = exact_alphas_cumprod().float().double()


def ddim(x, eps, a, b, eta=0.0, z=0.0):
    """One DDIM update from signal a to signal b, by the formula of the paper."""
    sigma = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
    x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
    return math.sqrt(b) * x0 + math.sqrt(1 - b - sigma**2) * eps + sigma * z


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("spacing", "visited"), [("uniform", [751, 501, 251, 1]), ("quad", [801, 356, 89, 1])])
def test_steps_end_at_the_noise_of_training_step_0(spacing, visited, eta):
    sampler = LatentDDIM(spacing, 4, eta)
    assert sampler.timesteps == visited
    x = X
    for k, (t, t_next) in enumerate(zip(visited, [*visited[1:], 0])):
        x = ddim(x, x.sin() * t / 1000, float(SIGNAL[t]), float(SIGNAL[t_next]), eta, (x * 0 + k).cos())
    end = sampler.run(lambda x, t: x.sin() * t.view(-1, 1, 1, 1) / 1000, X, lambda k: (X * 0 + k).cos())
    torch.testing.assert_close(end, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampler", [LatentDDIM("quad", 60), PLMS("quad", 60), LatentDDIM(steps=30), PLMS(steps=30)])
def test_a_perfect_denoiser_gives_its_image_with_the_noise_that_is_left(sampler):
    image, noise = X.flip(0), X.sin()
    at = dict(enumerate(SIGNAL.tolist()))

    def denoise(x, t):
        a = torch.tensor([at[int(v)] for v in t], dtype=x.dtype).view(-1, 1, 1, 1)
        return (x - a.sqrt() * image) / (1 - a).sqrt()

    a, b = at[sampler.timesteps[0]], at[0]
    start = math.sqrt(a) * image + math.sqrt(1 - a) * noise
    end = sampler.run(denoise, start)
    torch.testing.assert_close(end, math.sqrt(b) * image + math.sqrt(1 - b) * noise, rtol=0, atol=1e-9)


def test_repeated_timesteps_change_nothing():
    sampler = LatentDDIM("quad", 100, eta=1.0)
    assert sampler.timesteps[-4:] == [1, 1, 1, 1]
    states = []
    sampler.run(lambda x, t: x.sin(), X, lambda k: X.cos(), lambda k, t, x, eps: states.append(x))
    torch.testing.assert_close(states[-1], states[-4], rtol=0, atol=1e-12)


def test_plms_averages_in_the_first_step_and_extrapolates_after_it():
    sampler = PLMS("uniform", 5)
    assert sampler.timesteps == [801, 601, 601, 401, 201, 1]
    a = [float(SIGNAL[t]) for t in (801, 601, 401, 201, 1, 0)]
    calls = []

    def denoise(x, t):
        calls.append(x)
        return torch.full_like(x, float(len(calls)) ** 2)  # 1, 4, 9, 16, 25, 36: no order but the right one fits

    end = sampler.run(denoise, X)
    trial = ddim(X, 1.0, a[0], a[1])
    x1 = ddim(X, (1 + 4) / 2, a[0], a[1])
    x2 = ddim(x1, (3 * 9 - 1) / 2, a[1], a[2])
    x3 = ddim(x2, (23 * 16 - 16 * 9 + 5 * 1) / 12, a[2], a[3])
    x4 = ddim(x3, (55 * 25 - 59 * 16 + 37 * 9 - 9 * 1) / 24, a[3], a[4])
    x5 = ddim(x4, (55 * 36 - 59 * 25 + 37 * 16 - 9 * 9) / 24, a[4], a[5])
    for ours, expected in zip([*calls, end], [X, trial, x1, x2, x3, x4, x5], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


def test_plms_of_one_step_averages_two_calls_at_the_same_timestep():
    sampler, eps = PLMS("uniform", 1), iter([1.0, 4.0])
    assert sampler.timesteps == [1, 1] and sampler.step_of_call == [0, 0]
    end = sampler.run(lambda x, t: torch.full_like(x, next(eps)), X)
    torch.testing.assert_close(end, ddim(X, 2.5, float(SIGNAL[1]), float(SIGNAL[0])), rtol=0, atol=1e-12)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("sampler", [LatentDDIM, PLMS])
def test_a_run_equals_diffusers_pipelines_where_their_grid_is_the_same(sampler, steps):
    from diffusers import DDIMScheduler, PNDMScheduler

    config = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "steps_offset": 1}
    if sampler is PLMS:
        scheduler = PNDMScheduler(**config, skip_prk_steps=True)
    else:
        scheduler = DDIMScheduler(**config, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(steps)
    x = X.float()
    for t in scheduler.timesteps:
        x = scheduler.step(x.sin() * t / 1000, int(t), x).prev_sample
    end = sampler(steps=steps).run(lambda x, t: x.sin() * t.view(-1, 1, 1, 1) / 1000, X.float())
    assert (end - x).abs().max() <= 1e-5 * x.abs().max()  # their products are rounded to 1e-6


def test_settings_are_checked_at_once():
    with pytest.raises(EdadmError, match=r"eta is -0\.1"):
        LatentDDIM(eta=-0.1)
    for sampler in (LatentDDIM, PLMS):
        with pytest.raises(EdadmError, match=r"no leading timestep spacing 'linspace': choose one of uniform, quad"):
            sampler("linspace")
        with pytest.raises(EdadmError, match=r"36 steps .* choose 35 or 38"):
            sampler("uniform", 36)


@pytest.mark.parametrize(
    ("sampler", "pinned"),
    [
        (LatentDDIM("quad", 5, eta=0.5), [-18.478077, -17.591673, -16.872828, -16.269152]),
        (PLMS("uniform", 5), [-30.982197, -30.559076, -30.010967, -29.334223]),
    ],
)
def test_a_run_is_pinned(sampler, pinned):
    """Other values mean other images for every record: raise the sampler's version with the pin."""
    end = sampler.run(lambda x, t: x.sin() * t.view(-1, 1, 1, 1) / 800, X.float(), lambda k: X.float().cos())
    assert sampler.version == 1
    torch.testing.assert_close(end[0, 0, 0], torch.tensor(pinned), rtol=1e-5, atol=0)

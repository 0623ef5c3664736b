from __future__ import annotations

import math

import pytest
import torch

from edadm.errors import EdadmError
from edadm.sampling.ddpm import RespacedDDPM

X = torch.linspace(-2, 2, 2 * 3 * 4 * 4, dtype=torch.float64).reshape(2, 3, 4, 4)
TWO = RespacedDDPM(2, beta_start=0.5, beta_end=0.75, train_steps=2)  # products 0.5 and 0.125


def test_a_step_by_hand():
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    assert TWO.timesteps == [1, 0]
    # a 0.125, b 0.5: beta 0.75; x0 = (3 - sqrt(0.875)) / sqrt(0.125)
    x0 = (3 - math.sqrt(0.875)) / math.sqrt(0.125)
    mean = math.sqrt(0.5) * 0.75 / 0.875 * x0 + 0.5 * 0.5 / 0.875 * 3
    deviation = {1.0: math.sqrt(0.75), -1.0: math.sqrt(0.75 * 0.5 / 0.875)}
    deviation[0.0] = math.sqrt(deviation[1.0] * deviation[-1.0])
    for v, sigma in deviation.items():
        ours = TWO.step(3 * one, one, v * one, 1, 0, 2 * one)
        assert float(ours) == pytest.approx(mean + 2 * sigma, rel=1e-12)


def test_the_last_step_returns_the_predicted_sample_without_noise():
    ours = TWO.step(X, X.sin(), X, 0, -1)
    torch.testing.assert_close(ours, (X - math.sqrt(0.5) * X.sin()) / math.sqrt(0.5), rtol=0, atol=1e-12)


def test_a_run_equals_diffusers_with_the_noise_it_draws():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(variance_type="learned_range", clip_sample=False, timestep_spacing="linspace")
    scheduler.set_timesteps(7)
    sampler, x = RespacedDDPM(7), X.float()
    assert sampler.timesteps == scheduler.timesteps.tolist()

    def denoise(x, t):
        return torch.cat([x.sin() * t.view(-1, 1, 1, 1) / 1000, x.cos()], dim=1)

    generator = torch.Generator().manual_seed(0)
    for t in scheduler.timesteps:
        x = scheduler.step(denoise(x, t.repeat(2)), t, x, generator=generator).prev_sample
    generator.manual_seed(0)
    noise = [torch.randn(X.shape, generator=generator) for _ in range(6)]
    assert (sampler.run(denoise, X.float(), noise.__getitem__) - x).abs().max() <= 1e-5 * x.abs().max()


def test_respaced_timesteps_are_evenly_spaced_and_rounded():
    assert RespacedDDPM(5).timesteps == [999, 749, 500, 250, 0]
    assert len(RespacedDDPM(1000).timesteps) == 1000
    with pytest.raises(EdadmError, match="1001 steps"):
        RespacedDDPM(1001)


def test_a_run_is_pinned():
    """Other values mean other images for every record: raise the version of `RespacedDDPM` with the pin."""

    def denoise(x, t):
        return torch.cat([x.sin() * t.view(-1, 1, 1, 1) / 800, x.cos()], dim=1)

    end = RespacedDDPM(5).run(denoise, X.float(), lambda k: X.float().cos())
    assert RespacedDDPM().version == 1
    torch.testing.assert_close(
        end[0, 0, 0], torch.tensor([-135.01932, -119.77722, -113.55666, -112.21982]), rtol=1e-5, atol=0
    )

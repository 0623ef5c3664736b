from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from edadm.errors import Diverged
from edadm.metrics.frechet import NotAvailable
from edadm.metrics.paired import SQNR_CAP, StepSQNR, decibels, psnr, sqnr, sqnr_per_step, ssim, summary

from .conftest import random_images


def test_sqnr_is_the_ratio_of_energies():
    reference, other = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert sqnr(reference, other) == pytest.approx(10 * math.log10(25 / 0.25))


def test_sqnr_is_capped_where_it_would_be_infinite():
    x = torch.ones(3)
    assert sqnr(x, x) == SQNR_CAP
    assert sqnr(torch.zeros(3), x) == -SQNR_CAP
    assert decibels(np.zeros(1), np.zeros(1)) == SQNR_CAP
    assert decibels(np.ones(1), np.full(1, 1e-30)) == SQNR_CAP


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_steps_compare_both_networks_on_the_same_input(batch):
    x = torch.randn(3, 5, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    seen = []

    def fp(rows, t):
        seen.append((t.dtype, t.tolist()))
        return (rows * (1 + t[:, None, None, None]),)  # a tuple, like a diffusers output

    def quantized(rows, t):
        return rows * (1 + t[:, None, None, None]) + 0.1

    found = sqnr_per_step(fp, quantized, x, torch.tensor([9, 4, 0]), batch)
    assert found.timesteps == (9, 4, 0)
    assert seen[0] == (torch.int64, [9] * min(batch, 5))
    for step, t in enumerate((9, 4, 0)):
        reference = x[step] * (1 + t)
        assert found.values[step] == pytest.approx(sqnr(reference, reference + 0.1), rel=1e-6)
        for i in range(5):
            assert found.per_image[step, i] == pytest.approx(sqnr(reference[i], reference[i] + 0.1), rel=1e-6)
    assert found.mean == pytest.approx(np.mean(found.values))


def test_nan_in_a_prediction_stops_and_names_the_timestep():
    def broken(rows, t):
        return rows * (float("nan") if t[0] == 4 else 1)

    with pytest.raises(Diverged, match="timestep 4"):
        sqnr_per_step(lambda rows, t: rows, broken, torch.ones(2, 3, 1, 2, 2), [9, 4])


def test_steps_and_timesteps_must_match():
    with pytest.raises(ValueError, match="2 steps of trajectories but 1 timesteps"):
        sqnr_per_step(lambda rows, t: rows, lambda rows, t: rows, torch.ones(2, 3, 1, 2, 2), [9])


def test_summary_holds_the_curve_and_its_intervals(rng):
    steps = StepSQNR((9, 0), rng.uniform(90, 110, (2, 30)), rng.uniform(0.9, 1.1, (2, 30)))
    found = summary(steps, rng, resamples=200)
    assert found["n"] == 30 and found["timesteps"] == [9, 0] and len(found["per_step"]) == 2
    assert found["interval"][0] < found["value"] < found["interval"][1]
    for value, (low, high) in zip(found["per_step"], found["per_step_interval"], strict=True):
        assert low < value < high
    alone = summary(StepSQNR((9,), np.ones((1, 1)), np.ones((1, 1))), rng)
    assert alone["interval"] is None and alone["value"] == 0


def test_psnr_is_that_of_the_formula():
    a, b = random_images(4), random_images(4, seed=1)
    mse = (a.double() - b.double()).square().mean((1, 2, 3)).numpy()
    np.testing.assert_allclose(psnr(a, b), 10 * np.log10(255**2 / mse), rtol=1e-6)  # logs in float32


def test_identical_pairs_are_capped_and_identical_sets_not_available():
    a = random_images(3)
    b = a.clone()
    b[0, 0, 0, 0] ^= 1  # one grey level in one entry: the cap itself
    found = psnr(a, b)
    assert found[0] == pytest.approx(found[1]) and np.isfinite(found).all()
    with pytest.raises(NotAvailable, match="identical"):
        psnr(a, a)
    np.testing.assert_allclose(ssim(a, a), 1, atol=1e-6)


def test_ssim_falls_with_noise_and_needs_its_window():
    a = random_images(4)
    noise = torch.randint(0, 2, a.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mild, strong = a ^ (noise * 4), a ^ (noise * 64)
    assert (ssim(a, strong) < ssim(a, mild)).all() and (ssim(a, mild) < 1).all()
    with pytest.raises(NotAvailable, match="11 x 11"):
        ssim(random_images(2, 8), random_images(2, 8))


def test_images_must_pair_up():
    with pytest.raises(ValueError, match="pair up"):
        psnr(random_images(2), random_images(3))
    with pytest.raises(ValueError, match="uint8"):
        ssim(random_images(2).float(), random_images(2).float())

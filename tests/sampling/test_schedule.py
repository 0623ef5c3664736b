from __future__ import annotations

import numpy as np
import pytest
import torch

from edadm.errors import EdadmError
from edadm.sampling.schedule import (
    BETA_SCHEDULES,
    SPACINGS,
    alphas_cumprod,
    exact_alphas_cumprod,
    exact_betas,
    leading_timesteps,
    timesteps,
)


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_signal_falls_from_nearly_one(schedule):
    alphas = alphas_cumprod(schedule)
    assert alphas.dtype == torch.float32 and alphas.shape == (1000,)
    assert (alphas.diff() < 0).all() and 0.99 < alphas[0] < 1 and alphas[-1] >= 0


def test_linear_schedule_is_spaced_in_double_precision():
    betas = torch.from_numpy(np.linspace(1e-3, 1e-2, 50)).float()
    torch.testing.assert_close(alphas_cumprod("linear", 1e-3, 1e-2, 50), (1 - betas).cumprod(0))


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 20, 30, 100, 999, 1000])
def test_any_number_of_steps_goes_down_to_zero(spacing, steps):
    visited = timesteps(spacing, steps)
    assert visited[-1] == 0 and visited == sorted(visited, reverse=True)
    assert max(visited) <= (800 if spacing == "quad" else 999)
    assert len(visited) >= steps


def test_uniform_spacing_has_more_entries_when_steps_do_not_divide():
    assert len(timesteps("uniform", 30)) == 31
    assert timesteps("uniform", 20)[:2] == [950, 900]


def test_quad_spacing_truncates_and_may_repeat():
    assert timesteps("quad", 10)[::-1][:4] == [0, 9, 39, 88]
    assert timesteps("quad", 100)[-4:] == [0, 0, 0, 0]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_numbers_of_steps_are_named(steps):
    with pytest.raises(EdadmError, match=f"{steps} steps"):
        timesteps("quad", steps)


def test_linspace_spacing_is_rounded_and_has_both_ends():
    assert timesteps("linspace", 5) == [999, 749, 500, 250, 0]  # 249.75, 499.5 and 749.25; halves to even
    assert timesteps("linspace", 1000) == list(range(999, -1, -1))


def test_leading_timesteps_are_one_later():
    assert leading_timesteps("uniform", 20)[:2] == [951, 901] and leading_timesteps("uniform", 20)[-1] == 1
    assert leading_timesteps("quad", 10)[::-1][:4] == [1, 10, 40, 89]


@pytest.mark.parametrize(("steps", "near"), [(36, "35 or 38"), (105, "100 or 112"), (251, "250 or 334"), (501, "500")])
def test_leading_timesteps_beyond_the_training_name_the_nearest_numbers_of_steps(steps, near):
    with pytest.raises(EdadmError, match=rf"{steps} steps .* start at timestep 1000.*: choose {near}$"):
        leading_timesteps("uniform", steps)
    assert max(leading_timesteps("quad", steps)) == 801


def test_unknown_names_list_the_choices():
    with pytest.raises(EdadmError, match="uniform, quad, linspace"):
        timesteps("cubic", 10)
    with pytest.raises(EdadmError, match="uniform, quad"):
        leading_timesteps("linspace", 10)
    with pytest.raises(EdadmError, match="scaled_linear"):
        exact_betas("sigmoid")
    with pytest.raises(EdadmError, match="scaled_linear"):
        alphas_cumprod("sigmoid")


@pytest.mark.parametrize("schedule", BETA_SCHEDULES)
def test_exact_products_are_those_of_diffusers_up_to_its_rounding(schedule):
    exact = exact_alphas_cumprod(schedule, 1e-4, 2e-2)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.float(), alphas_cumprod(schedule), rtol=1e-5, atol=0)
    torch.testing.assert_close(1 - exact[1:] / exact[:-1], exact_betas(schedule, 1e-4, 2e-2)[1:], rtol=1e-9, atol=0)


def test_exact_betas_by_hand():
    assert exact_betas("linear", 0.1, 0.3, 3).tolist() == pytest.approx([0.1, 0.2, 0.3], rel=1e-15)
    assert exact_betas("scaled_linear", 0.01, 0.09, 3).tolist() == pytest.approx([0.01, 0.04, 0.09], rel=1e-15)

from __future__ import annotations

import numpy as np
import pytest
import torch

from edadm.errors import EdadmError
from edadm.sampling.schedule import BETA_SCHEDULES, SPACINGS, alphas_cumprod, timesteps


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


def test_unknown_names_list_the_choices():
    with pytest.raises(EdadmError, match="uniform, quad"):
        timesteps("cubic", 10)
    with pytest.raises(EdadmError, match="scaled_linear"):
        alphas_cumprod("sigmoid")

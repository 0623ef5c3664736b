"""The DDIM sampler against official trajectories (golden README 4)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edadm.sampling.ddim import Sampler
from edadm.sampling.schedule import alphas_cumprod, timesteps
from tests.golden.cases import load


@pytest.fixture(scope="module")
def case_and_tensors(golden: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return load(golden / "eda_ddim" / "03_ddim")


def sampler_of(run: dict, tensors: dict[str, torch.Tensor]) -> Sampler:
    betas = tensors["betas"]
    sampler = Sampler(run["kind"], run["S"], run["eta"], train_steps=len(betas))
    assert sampler.timesteps == run["seq_ascending"][::-1]
    return sampler


def relative_to_max(ours: torch.Tensor, official: torch.Tensor) -> float:
    return float((ours - official).abs().max() / official.abs().max())


def test_schedule_equals_official(case_and_tensors):
    _, tensors = case_and_tensors
    betas, with_one_first = tensors["betas"], tensors["alpha_cumprod_with_one_first"]
    ours = alphas_cumprod("linear", 1e-4, 2e-2, len(betas))
    torch.testing.assert_close(ours, with_one_first[1:], rtol=1e-6, atol=0)  # float32 product in another order
    assert Sampler(train_steps=len(betas)).alpha_bar(-1) == with_one_first[0] == 1


def test_timestep_lists_equal_official(case_and_tensors):
    case, tensors = case_and_tensors
    for name, ascending in case["timestep_lists"].items():
        spacing, steps = name.rsplit("_", 1)
        assert timesteps(spacing, int(steps), len(tensors["betas"])) == ascending[::-1], name


def test_single_steps_equal_official(case_and_tensors):
    case, tensors = case_and_tensors
    for name, run in case["runs"].items():
        sampler, x, eps = sampler_of(run, tensors), tensors[f"{name}.x"], tensors[f"{name}.eps"]
        noise, x0 = tensors.get(f"{name}.noise"), tensors.get(f"{name}.x0_pred")
        for k, (t, t_next) in enumerate(sampler.pairs):
            ours = sampler.step(x[k], eps[k], t, t_next, None if noise is None else noise[k])
            assert relative_to_max(ours, x[k + 1]) <= case["tolerance"]["single_step_rel_to_max"], (name, k)
            if x0 is not None:
                ours = sampler.predict_x0(x[k], eps[k], t)
                assert relative_to_max(ours, x0[k]) <= case["tolerance"]["single_step_rel_to_max"], (name, k)


def test_noise_predictions_equal_official(case_and_tensors, golden_unet):
    case, tensors = case_and_tensors
    for name, run in case["runs"].items():
        for k, t in enumerate(sampler_of(run, tensors).timesteps):
            x, eps = tensors[f"{name}.x"][k], tensors[f"{name}.eps"][k]
            with torch.no_grad():
                ours = golden_unet(x, torch.full((len(x),), t)).sample
            assert relative_to_max(ours, eps) <= case["tolerance"]["eps_max_abs_rel_to_max"], (name, k)


def test_free_running_trajectories_equal_official(case_and_tensors, golden_unet):
    case, tensors = case_and_tensors
    for name, run in case["runs"].items():
        x, noise = tensors[f"{name}.x"], tensors.get(f"{name}.noise")
        seen = []
        end = sampler_of(run, tensors).run(
            golden_unet,
            x[0],
            noise_for_step=None if noise is None else noise.__getitem__,
            observe=lambda k, t, x, eps, seen=seen: seen.append(x),
        )
        assert relative_to_max(torch.stack([*seen, end]), x) <= case["tolerance"]["free_running_rel_to_max"], name

"""Samplers and guidance of latent diffusion and DiT against official trajectories (golden README, ldm, 5, 6 and 8)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from edadm.errors import EdadmError
from edadm.sampling.ddpm import RespacedDDPM
from edadm.sampling.guidance import ClassConditions, Condition, Guidance, denoise_for
from edadm.sampling.interface import DiffusionSampler
from edadm.sampling.latent import PLMS, LatentDDIM
from edadm.sampling.multistep import DPMSolver
from edadm.sampling.schedule import exact_alphas_cumprod, exact_betas
from edadm.tasks.compvis_unet import convert_unet, unet_params
from edadm.tasks.dit_checkpoint import convert_dit, dit_params
from tests.golden import ldm_cases
from tests.golden.ldm_cases import Case

PRECISIONS = (torch.float64, torch.float32)


@dataclass(frozen=True)
class Labelled:
    """The conditions of a golden case: labels in the order of the rows, or one number per row."""

    given: Condition
    null: Condition

    def rows(self, stream: str, seed: int, numbers: range) -> Condition:
        return self.given

    def identity(self, stream: str) -> dict[str, Any]:
        return {}


@pytest.fixture(params=ldm_cases.names("schedules"))
def schedules(request) -> Case:
    return ldm_cases.load(request.param)


@pytest.fixture(params=ldm_cases.names("samplers"))
def analytic(request) -> Case:
    return ldm_cases.load(request.param)


@pytest.fixture(params=ldm_cases.names("samplers_model"))
def guided(request) -> Case:
    return ldm_cases.load(request.param)


@pytest.fixture(params=ldm_cases.names("samplers_dit"))
def respaced(request) -> Case:
    return ldm_cases.load(request.param)


def schedule_of(entries: dict[str, Any], name: str) -> dict[str, Any]:
    entry = entries[name]
    kind = "scaled_linear" if "sqrt" in entry["rule"] else "linear"
    return {"beta_schedule": kind, "beta_start": entry["linear_start"], "beta_end": entry["linear_end"]}


def sampler_of(run: dict[str, Any], entries: dict[str, Any]) -> DiffusionSampler:
    numbers = {"steps": run["steps"], **schedule_of(entries, run["schedule"])}
    if run["sampler"] == "ddim":
        return LatentDDIM(run["discretize"], eta=run["eta"], **numbers)
    if run["sampler"] == "plms":
        return PLMS(run["discretize"], **numbers)
    assert run["sampler"] == "dpm"
    return DPMSolver(**numbers)


def trajectory(sampler: DiffusionSampler, denoise: Callable, x: Tensor, noise: Tensor | None) -> tuple[Tensor, list]:
    """The states after 0, 1, ... updates, and the times that the network was given."""
    states: list[Tensor] = []
    times: list[Tensor] = []

    def called(x: Tensor, t: Tensor) -> Any:
        times.append(t)
        return denoise(x, t)

    def keep(k: int, t: float, x: Tensor, eps: Tensor) -> None:
        if sampler.step_of_call[k] == len(states):  # the trial state of PLMS is none
            states.append(x)

    end = sampler.run(called, x, None if noise is None else noise.__getitem__, observe=keep)
    return torch.stack([*states, end]), times


def assert_times(times: list[Tensor], stored: Tensor, rows: int) -> None:
    assert {len(t) for t in times} == {rows}
    assert all((t == t[0]).all() for t in times)
    assert [t[0].item() for t in times] == stored.tolist()
    assert {t.dtype for t in times} == {torch.float64 if stored.is_floating_point() else torch.int64}


def worst(ours: Tensor, stored: Tensor) -> float:
    assert ours.shape == stored.shape and ours.dtype == stored.dtype
    return float((ours - stored).abs().max())


def test_betas_and_products_equal_the_original(schedules):
    for name in schedules.config["entries"]:
        numbers = schedule_of(schedules.config["entries"], name)
        assert worst(exact_betas(**numbers), schedules.io[f"{name}.betas_f64"]) <= schedules.tolerance["f64_abs"]
        products = exact_alphas_cumprod(**numbers)
        assert worst(products, schedules.io[f"{name}.alphas_cumprod_f64"]) <= schedules.tolerance["f64_abs"]
        if f"{name}.alphas_cumprod_f32" in schedules.io:
            assert torch.equal(products.float(), schedules.io[f"{name}.alphas_cumprod_f32"])


def noise_function(x: Tensor, t: Tensor, c: Tensor | None = None) -> Tensor:
    """The closed form of golden README, ldm, 5.1, in the precision of x."""
    u = (t.to(x.dtype) / 1000).view(-1, 1, 1, 1)
    eps = (0.25 + 0.7 * u) * x + 0.3 * torch.sin(6 * u) * torch.cos(0.5 * x)
    return eps if c is None else eps + 0.2 * c.to(x.dtype).view(-1, 1, 1, 1) * torch.cos(x - 2 * u)


def analytic_denoise(case: Case, run: dict[str, Any]) -> Callable:
    if run["guidance_scale"] == 1:
        return noise_function
    pairs = zip(case.io["c"].split(1), case.io["uc"].split(1), strict=True)
    guided = [Guidance(Labelled({"c": c}, {"c": uc}), run["guidance_scale"]) for c, uc in pairs]
    rows = [denoise_for(noise_function, guidance, "golden", 0, range(1)) for guidance in guided]

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([row(*one) for row, one in zip(rows, zip(x.split(1), t.split(1)), strict=True)])

    return denoise


def test_trajectories_of_a_closed_form_equal_the_original(analytic, schedules):
    tolerance = analytic.tolerance
    for name, run in analytic.config["runs"].items():
        sampler, denoise = sampler_of(run, schedules.config["entries"]), analytic_denoise(analytic, run)
        for dtype in PRECISIONS:
            x = analytic.io["x_T"].to(dtype)
            states, times = trajectory(sampler, denoise, x, analytic.io["noise"])
            assert (len(times), len(states)) == (run["n_model_calls"], run["n_updates"] + 1), name
            assert_times(times, analytic.io[f"{name}.model_t"], len(x))
            if dtype == torch.float64:
                kept = states[run["saved_indices"]]
                limit = tolerance["dpm_diffusers_abs" if run["sampler"] == "dpm" else "f64_abs"]
                assert worst(kept, analytic.io[f"{name}.x_f64"]) <= limit, name
            else:
                assert worst(states[-1], analytic.io[f"{name}.x_final_f32"]) <= tolerance["f32_abs"], name


def test_timesteps_and_products_of_the_steps_equal_the_original(analytic, schedules):
    for name, run in analytic.config["runs"].items():
        if f"{name}.ddim_timesteps" not in analytic.io:
            continue
        sampler = sampler_of(run, schedules.config["entries"])
        first = dict(reversed(list(zip(sampler.step_of_call, sampler.timesteps, strict=True))))
        ascending = torch.tensor([first[step] for step in sorted(first, reverse=True)])
        assert torch.equal(ascending, analytic.io[f"{name}.ddim_timesteps"]), name
        signal = exact_alphas_cumprod(**schedule_of(schedules.config["entries"], run["schedule"])).float().double()
        here, before, _ = analytic.io[f"{name}.coef_f64"]
        assert worst(signal[ascending], here) == 0, name
        assert worst(torch.cat([signal[:1], signal[ascending[:-1]]]), before) == 0, name


def network_of(case: Case) -> tuple[torch.nn.Module, Case]:
    """The network of the case that holds the weights."""
    weights = ldm_cases.load(case.config["weights_case"])
    original, name = weights.config["original"], case.config["weights_case"]
    if weights.config["kind"] == "dit":
        return convert_dit(weights.weights, dit_params(original["params"]), name), weights
    prefix = weights.config["checkpoint_prefix"]
    state = {key.removeprefix(prefix): t for key, t in weights.weights.items() if key.startswith(prefix)}
    return convert_unet(state, unet_params(original["params"], original["norm_groups"]), name), weights


def guided_denoise(case: Case, network: torch.nn.Module, weights: Case, run: dict[str, Any], dtype) -> Callable:
    embedding = weights.weights["cond_stage_model.embedding.weight"].to(dtype)
    table = ClassConditions(len(embedding) - 1, case.config["null_class"], embedding)
    conditions = Labelled(table.of(case.io["y"]), table.null)
    guidance = Guidance(conditions, run["guidance_scale"])
    return denoise_for(network.to(dtype), guidance, "golden", 0, range(len(case.io["y"])))


@pytest.mark.parametrize("dtype", PRECISIONS, ids=["float64", "float32"])
def test_guided_trajectories_of_a_network_equal_the_original(guided, schedules, dtype):
    tolerance, (network, weights) = guided.tolerance, network_of(guided)
    for name, run in guided.config["runs"].items():
        sampler = sampler_of(run, schedules.config["entries"])
        denoise = guided_denoise(guided, network, weights, run, dtype)
        states, times = trajectory(sampler, denoise, guided.io["x_T"].to(dtype), guided.io["noise"])
        assert (len(times), len(states)) == (run["n_model_calls"], run["n_updates"] + 1), name
        assert_times(times, guided.io[f"{name}.model_t"], len(guided.io["x_T"]))
        unit = float(guided.io[f"{name}.x_f64"].abs().max())
        if dtype == torch.float64:
            limit = tolerance["dpm_diffusers_rel_to_absmax" if run["sampler"] == "dpm" else "f64_rel_to_absmax"]
            assert worst(states, guided.io[f"{name}.x_f64"]) <= limit * unit, name
        else:
            limit = tolerance["f32_rel_to_absmax"]
            assert worst(states[-1], guided.io[f"{name}.x_final_f32"]) <= limit * unit, name


@pytest.mark.parametrize("dtype", PRECISIONS, ids=["float64", "float32"])
def test_respaced_trajectories_of_dit_equal_the_original(respaced, schedules, dtype):
    given, io = respaced.config, respaced.io
    network, _ = network_of(respaced)
    n = len(io["z"])
    labels, nulls = io["y"].split(n)
    assert (nulls == given["null_class"]).all()
    table = ClassConditions(given["null_class"], given["null_class"])
    guidance = Guidance(Labelled(table.of(labels), table.null), given["cfg_scale"], given["cfg_channels"])
    denoise = denoise_for(network.to(dtype), guidance, "golden", 0, range(n))
    sampler = RespacedDDPM(given["steps"], **schedule_of(schedules.config["entries"], given["schedule"]))
    # the original carries the null rows along and replaces them by the others before each call
    states, times = trajectory(sampler, denoise, io["z"].to(dtype), io["noise"][:, :n])
    assert_times(times, io["model_t"], n)
    unit = float(io["x_f64"].abs().max())
    if dtype == torch.float64:
        assert worst(states, io["x_f64"]) <= respaced.tolerance["f64_rel_to_absmax"] * unit
    else:
        assert worst(states[-1], io["x_final_f32"]) <= respaced.tolerance["f32_rel_to_absmax"] * unit


CRASHES = {3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001)}  # golden README, ldm, 5.3.2


@pytest.mark.parametrize("sampler", [LatentDDIM, PLMS])
def test_numbers_of_steps_at_which_the_original_crashes_are_errors(sampler):
    for steps in range(1, 1001):
        if steps in CRASHES:
            with pytest.raises(EdadmError, match=f"{steps} steps .* start at timestep 1000"):
                sampler("uniform", steps)
        else:
            assert max(sampler("uniform", steps).timesteps) <= 999


def test_numbers_of_steps_that_are_kept_are_those_of_the_original():
    kept = {s for s in range(1, 501) if s not in CRASHES and len(LatentDDIM("uniform", s).timesteps) == s}
    assert kept == {1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500}
    assert [len(LatentDDIM("uniform", s).timesteps) for s in (30, 60, 150, 400)] == [31, 63, 167, 500]

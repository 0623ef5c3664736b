from __future__ import annotations

import pytest
import torch

from edadm.errors import Diverged, EdadmError
from edadm.sampling.ddim import Sampler
from edadm.sampling.ddpm import RespacedDDPM
from edadm.sampling.flow import FlowEuler
from edadm.sampling.from_scheduler import sampler_of
from edadm.sampling.interface import fitted, split_variance, times
from edadm.sampling.latent import PLMS, LatentDDIM
from edadm.sampling.multistep import DPMSolver, DPMSolverPP, UniPC

DETERMINISTIC = [LatentDDIM(steps=5), PLMS(steps=5), DPMSolver(5), DPMSolverPP(5), UniPC(5), Sampler("linspace", 5)]
SAMPLERS = [*DETERMINISTIC, LatentDDIM("quad", 4, eta=1.0), RespacedDDPM(5)]
EULER = {"_class_name": "EulerDiscreteScheduler", "beta_schedule": "scaled_linear"}
ALL = [*SAMPLERS, FlowEuler(5), sampler_of(EULER, 5), sampler_of({"_class_name": "DDPMScheduler"}, 5)]
X = torch.linspace(-2, 2, 4 * 2 * 3 * 3).reshape(4, 2, 3, 3)


def denoise(x, t):
    """A network whose rows do not touch each other, with a variance."""
    eps = x.sin() * (0.5 + t.to(x.dtype).view(-1, 1, 1, 1) / 2000)
    return torch.cat([eps, 0.5 * x.cos()], dim=1)


def noise_of(rows):
    return lambda k: torch.stack([torch.full((2, 3, 3), 0.1 * k - 0.3 * row) for row in rows])


@pytest.mark.parametrize("sampler", ALL, ids=repr)
def test_every_call_is_observed_with_its_time_and_a_corrected_noise(sampler):
    seen, asked = [], []

    def network(x, t):
        asked.append(t)
        return denoise(x, t)

    def observe(k, t, x, eps):
        seen.append((k, t))
        assert x.shape == eps.shape == X.shape and torch.equal(eps, denoise(x, torch.full((4,), t))[:, :2] + 1)

    sampler.run(network, X, noise_of(range(4)), observe, lambda k, t, x, eps: eps + 1)
    assert seen == list(enumerate(sampler.timesteps))
    assert [t.tolist() for t in asked] == [[t] * 4 for t in sampler.timesteps]
    assert len(sampler.step_of_call) == len(seen) and list(sampler.step_of_call) == sorted(sampler.step_of_call)


@pytest.mark.parametrize("sampler", ALL, ids=repr)
def test_how_rows_are_put_into_batches_does_not_matter(sampler):
    whole = sampler.run(denoise, X, noise_of(range(4)))
    parts = [sampler.run(denoise, X[rows], noise_of(rows)) for rows in ([0], [1, 2, 3])]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("sampler", ALL, ids=repr)
def test_a_run_leaves_nothing_behind_in_the_sampler_or_its_input(sampler):
    before = X.clone()
    assert torch.equal(sampler.run(denoise, X, noise_of(range(4))), sampler.run(denoise, X, noise_of(range(4))))
    assert torch.equal(X, before)


@pytest.mark.parametrize("sampler", SAMPLERS[:5] + ALL[6:], ids=repr)
def test_samples_have_the_type_of_the_noise(sampler):
    low, high = (sampler.run(denoise, X.to(dtype), noise_of(range(4))) for dtype in (torch.float32, torch.float64))
    assert (low.dtype, high.dtype) == (torch.float32, torch.float64)
    assert (low - high).abs().max() <= 1e-5 * high.abs().max()  # float32 rounding over a few steps


@pytest.mark.parametrize("sampler", ALL, ids=repr)
def test_divergence_names_the_call_and_its_time(sampler):
    where = sampler.timesteps[2]

    def network(x, t):
        out = denoise(x, t)
        out[1] = out[1] + (float("nan") if t[0] == where else 0)
        return out

    with pytest.raises(Diverged, match=rf"in 1 of 4 .* sampling step [23] of {len(sampler.timesteps)} .*{where}"):
        sampler.run(network, X, noise_of(range(4)))


@pytest.mark.parametrize("sampler", [LatentDDIM(eta=0.5), RespacedDDPM(5), ALL[-1]], ids=repr)
def test_missing_noise_is_an_error(sampler):
    with pytest.raises(ValueError, match="adds noise after call 0"):
        sampler.run(denoise, X)


def test_only_steps_of_plms_have_two_calls():
    assert list(PLMS(steps=4).step_of_call) == [0, 0, 1, 2, 3]
    for sampler in ALL:
        if not isinstance(sampler, PLMS):
            assert list(sampler.step_of_call) == list(range(len(sampler.timesteps)))


def test_times_are_whole_or_fractional():
    assert (times(7, 2, "cpu").dtype, times(7.0, 2, "cpu").dtype) == (torch.int64, torch.float64)


def test_noise_and_variance_are_told_apart():
    eps, variance = split_variance(torch.arange(4.0).view(1, 4, 1, 1), 2)
    assert eps.flatten().tolist() == [0, 1] and variance.flatten().tolist() == [2, 3]
    assert split_variance(eps, 2) == (eps, None)
    with pytest.raises(EdadmError, match=r"3 channels for samples of 2: expected 2 .* or 4"):
        split_variance(torch.zeros(1, 3, 1, 1), 2)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=repr)
def test_a_model_that_predicts_something_else_is_an_error(sampler):
    with pytest.raises(EdadmError, match=rf"{type(sampler).__name__} .*predicts flow_prediction: .*sampler=flow_euler"):
        fitted(sampler, "flow_prediction", learned_variance=True)
    with pytest.raises(EdadmError, match="predicts curl: choose a sampler of noise"):
        fitted(sampler, "curl", learned_variance=True)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_sampler_of_flows_needs_a_flow(prediction):
    flow = FlowEuler(5)
    assert fitted(flow, "flow_prediction", learned_variance=False) == flow
    with pytest.raises(EdadmError, match=rf"FlowEuler steps with flow_prediction, this model predicts {prediction}"):
        fitted(flow, prediction, learned_variance=False)


def test_a_sampler_with_variance_needs_a_model_with_one():
    for sampler in SAMPLERS:
        assert fitted(sampler, "epsilon", learned_variance=True) == sampler
    for sampler in DETERMINISTIC:
        assert fitted(sampler, "epsilon", learned_variance=False) == sampler
    with pytest.raises(EdadmError, match="RespacedDDPM needs the variance"):
        fitted(RespacedDDPM(), "epsilon", learned_variance=False)
    with pytest.raises(EdadmError, match="RespacedDDPM needs the variance"):
        RespacedDDPM(5).run(lambda x, t: x, X, noise_of(range(4)))

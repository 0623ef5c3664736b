"""Networks that predict a velocity or the clean sample, with every sampler that steps with noise."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from edadm.sampling.ddim import Sampler
from edadm.sampling.ddpm import RespacedDDPM
from edadm.sampling.diffusion import noise_of, sample_of
from edadm.sampling.latent import PLMS, LatentDDIM
from edadm.sampling.multistep import DPMSolver, DPMSolverPP, UniPC

X = torch.linspace(-2, 2, 2 * 2 * 4 * 4, dtype=torch.float64).reshape(2, 2, 4, 4)
SAMPLERS = [
    Sampler("quad", 6, eta=0.5), Sampler("linspace", 6), LatentDDIM(steps=6, eta=1.0), PLMS(steps=6), DPMSolver(6),
    DPMSolverPP(6), UniPC(6), RespacedDDPM(6),
]  # fmt: skip
PREDICTIONS = ["v_prediction", "sample"]


def noise(x, t):
    return 0.7 * x.sin() + t.view(-1, 1, 1, 1) / 2000


def predicted(prediction, sampler):
    """A network of this output that knows the same as `noise`, by the definitions of the two."""
    logarithm = np.log(np.cumprod(1 - betas_of(sampler)))

    def network(x, t):
        a = float(np.exp(np.interp(float(t[0]), np.arange(1000), logarithm)))
        eps = noise(x, t)
        x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        output = x0 if prediction == "sample" else a**0.5 * eps - (1 - a) ** 0.5 * x0
        return torch.cat([output, x.cos()], dim=1) if sampler.needs_variance else output

    return network


def betas_of(sampler):
    root = 0.5 if sampler.beta_schedule == "scaled_linear" else 1.0
    return np.linspace(sampler.beta_start**root, sampler.beta_end**root, 1000) ** (1 / root)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_what_stands_for_the_same_noise_makes_the_same_samples(sampler, prediction):
    def plain(x, t):
        return torch.cat([noise(x, t), x.cos()], dim=1) if sampler.needs_variance else noise(x, t)

    states = [[], []]
    ends = [
        one.run(network, X, lambda k: X.cos() + k, observe=lambda k, t, x, output, seen=seen: seen.append(x))
        for one, network, seen in [
            (sampler, plain, states[0]),
            (sampler.predicting(prediction), predicted(prediction, sampler), states[1]),
        ]
    ]
    in_float32 = isinstance(sampler, DPMSolver | DPMSolverPP | UniPC)  # diffusers' multistep solvers cast to it
    tolerance = 1e-5 if in_float32 else 1e-9
    for one, other in zip([*states[0], ends[0]], [*states[1], ends[1]], strict=True):
        assert (one - other).abs().max() <= tolerance * one.abs().max()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("sampler", "scheduler", "config"),
    [
        (Sampler("uniform", 10), "DDIMScheduler", {}),
        (Sampler("uniform", 10, eta=1.0), "DDIMScheduler", {}),
        (LatentDDIM(steps=10), "DDIMScheduler", {"steps_offset": 1, "set_alpha_to_one": False}),
        (DPMSolverPP(10), "DPMSolverMultistepScheduler", {}),
        (DPMSolverPP(10, order=3), "DPMSolverMultistepScheduler", {"solver_order": 3}),
        (UniPC(10), "UniPCMultistepScheduler", {}),
        (RespacedDDPM(10), "DDPMScheduler", {"variance_type": "learned_range", "timestep_spacing": "linspace"}),
    ],
    ids=["ddim", "ddim eta 1", "latent ddim", "dpm", "dpm order 3", "unipc", "ddpm"],
)
def test_steps_equal_those_of_diffusers_with_this_prediction(sampler, scheduler, config, prediction):
    named = {key: getattr(sampler, key) for key in ("beta_schedule", "beta_start", "beta_end")}
    clip = {"clip_sample": False} if scheduler in ("DDIMScheduler", "DDPMScheduler") else {}
    theirs = getattr(diffusers, scheduler)(**named, **clip, **config, prediction_type=prediction)
    theirs.set_timesteps(10)
    extra = {"eta": sampler.eta} if getattr(sampler, "eta", 0) else {}
    if extra or sampler.needs_variance:
        extra["generator"] = torch.Generator().manual_seed(3)

    def network(x, t):
        output = 0.7 * x.sin() + torch.as_tensor(t).reshape(-1, 1, 1, 1) / 2000
        return torch.cat([output, x.cos()], dim=1) if sampler.needs_variance else output

    x, inputs = X.float(), []
    for t in theirs.timesteps:
        inputs.append(x)
        x = theirs.step(network(x, t), t, x, **extra).prev_sample
    generator, seen = torch.Generator().manual_seed(3), []
    end = sampler.predicting(prediction).run(
        network, X.float(), lambda k: torch.randn(X.shape, generator=generator), lambda k, t, x, output: seen.append(x)
    )
    for one, other in zip([*seen, end], [*inputs, x], strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()  # their betas are rounded to float32


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_what_is_seen_and_corrected_is_the_networks_own_output(prediction):
    sampler, seen = Sampler("uniform", 4).predicting(prediction), []
    network = predicted(prediction, sampler)
    sampler.run(network, X, None, lambda k, t, x, output: seen.append((x, output)), lambda k, t, x, output: output + 1)
    for t, (x, output) in zip(sampler.timesteps, seen, strict=True):
        assert torch.equal(output, network(x, torch.tensor([t])) + 1)


def test_noise_and_sample_by_hand():
    x, half = torch.full((1, 1), 5.0), torch.tensor(0.36)  # x = 0.6 x0 + 0.8 eps: x0 3, eps 4, v = 0.6 * 4 - 0.8 * 3
    three, four, v = torch.tensor([[3.0]]), torch.tensor([[4.0]]), torch.tensor([[0.0]])
    for prediction, output in (("sample", three), ("v_prediction", v)):
        assert float(noise_of(prediction, x, output, half)) == pytest.approx(4, rel=1e-6)
    for prediction, output in (("sample", three), ("v_prediction", v), ("epsilon", four)):
        assert float(sample_of(prediction, x, output, half)) == pytest.approx(3, rel=1e-6)
    with pytest.raises(ValueError, match="no noise in epsilon"):
        noise_of("epsilon", x, four, half)


def test_signal_is_that_of_training_at_whole_times_and_between_them_elsewhere():
    sampler = LatentDDIM()
    assert float(sampler.signal(7)) == pytest.approx(float(sampler.products[7]), rel=1e-12)
    between = (sampler.products[7] * sampler.products[8]).sqrt()
    assert float(sampler.signal(7.5)) == pytest.approx(float(between), rel=1e-12)

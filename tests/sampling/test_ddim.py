from __future__ import annotations

import dataclasses

import pytest
import torch

from edadm.errors import Diverged, EdadmError
from edadm.sampling.ddim import Sampler
from edadm.sampling.interface import unwrap

X = torch.linspace(-2, 2, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)


def noise_of(sampler: Sampler, image: torch.Tensor):
    """The perfect denoiser of a data set that holds one image."""

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = torch.stack([sampler.alpha_bar(int(v)) for v in t]).view(-1, 1, 1, 1)
        return (x - a.sqrt() * image) / (1 - a).sqrt()

    return denoise


@pytest.mark.parametrize("spacing", ["quad", "uniform"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_perfect_denoiser_gives_its_image(spacing, eta):
    sampler = Sampler(spacing, 13, eta)
    image = torch.rand(1, 3, 4, 4)
    generator = torch.Generator().manual_seed(0)
    end = sampler.run(noise_of(sampler, image), X, lambda k: torch.randn(X.shape, generator=generator))
    torch.testing.assert_close(end, image.expand_as(end), rtol=0, atol=1e-4)  # x0 = (x - s e) / a in float32


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_step_equals_diffusers_where_its_rule_holds(eta):
    from diffusers import DDIMScheduler

    sampler = Sampler("uniform", 10, eta)
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    eps, z = X.flip(0), X.flip(2)
    for t, t_next in sampler.pairs:
        theirs = scheduler.step(eps, t, X, eta=eta, variance_noise=z if eta else None).prev_sample
        ours = sampler.step(X, eps, t, t_next, z)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_last_step_returns_the_predicted_image():
    sampler = Sampler("quad", 5, eta=1.0)
    t, t_next = sampler.pairs[-1]
    assert t_next == -1
    assert torch.equal(sampler.step(X, X, t, t_next), sampler.predict_x0(X, X, t))


def test_repeated_timesteps_change_nothing():
    sampler = Sampler("quad", 100, eta=1.0)
    assert sampler.pairs[-2] == (0, 0)
    torch.testing.assert_close(sampler.step(X, X.flip(0), 0, 0), X)


def test_inputs_are_not_changed():
    x, eps = X.clone(), X.flip(0)
    before = eps.clone()
    Sampler().step(x, eps, 500, 400)
    assert torch.equal(x, X) and torch.equal(eps, before)


def test_hooks_see_every_call_in_order():
    sampler, seen = Sampler("quad", 4), []

    def correct(k, t, x, eps):
        return eps + k

    def observe(k, t, x, eps):
        seen.append((k, t, float(eps.flatten()[0])))

    sampler.run(lambda x, t: torch.zeros_like(x), X, observe=observe, correct=correct)
    assert seen == [(k, t, float(k)) for k, t in enumerate(sampler.timesteps)]


def test_network_outputs_of_every_kind_are_read():
    from diffusers.models.unets.unet_2d import UNet2DOutput

    assert unwrap(X) is X and unwrap((X,)) is X and unwrap(UNet2DOutput(sample=X)) is X


def test_half_precision_outputs_are_added_in_float32():
    end = Sampler(steps=3).run(lambda x, t: x.to(torch.bfloat16), X)
    assert end.dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_divergence_names_step_timestep_and_number_of_samples(bad):
    sampler = Sampler("uniform", 4)

    def denoise(x, t):
        eps = torch.zeros_like(x)
        if t[0] == sampler.timesteps[2]:
            eps[1, 0, 0, 0] = bad
        return eps

    with pytest.raises(Diverged, match=r"in 1 of 2 samples after sampling step 3 of 4 \(timestep 250\)"):
        sampler.run(denoise, X)


def test_missing_noise_is_an_error():
    with pytest.raises(ValueError, match="adds noise"):
        Sampler(eta=0.5).run(lambda x, t: x, X)


def test_settings_are_checked_at_once():
    with pytest.raises(EdadmError, match=r"eta is 1\.5"):
        Sampler(eta=1.5)
    with pytest.raises(EdadmError, match="spacing"):
        Sampler(spacing="cosine")


def test_a_run_is_pinned():
    """Other values mean other images for every record: raise the version of `Sampler` with the pin."""
    sampler = Sampler("quad", 5, eta=0.5)
    end = sampler.run(lambda x, t: x.sin() * t.view(-1, 1, 1, 1) / 800, X, lambda k: X.cos())
    assert sampler.version == 1
    torch.testing.assert_close(
        end[0, 0, 0], torch.tensor([-31.935287, -30.373007, -28.422506, -26.176172]), rtol=1e-5, atol=0
    )


def test_settings_are_plain_data():
    assert dataclasses.asdict(Sampler())["version"] == 1

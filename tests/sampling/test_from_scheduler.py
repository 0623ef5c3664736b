"""Samplers made of scheduler_config.json files, against diffusers' own loops and pipelines, call by call."""

from __future__ import annotations

import json
import math

import diffusers
import pytest
import torch
from torch import nn

from edadm.errors import EdadmError
from edadm.sampling.flow import FlowEuler
from edadm.sampling.from_scheduler import sampler_of
from edadm.sampling.scheduler import SchedulerSampler
from edadm.store import content_hash
from tests.tasks.narrow import FIRST_STAGES, random_model
from tests.toys import conditional_unet, diffusion_transformer, flux_transformer, sd3_transformer, tiny_unet

LATENT = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
# scheduler_config.json as published with the weights
SD14 = {
    "_class_name": "PNDMScheduler", "_diffusers_version": "0.7.0.dev0", "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "trained_betas": None, "clip_sample": False, **LATENT,
}  # fmt: skip
SD21 = {
    "_class_name": "DDIMScheduler", "_diffusers_version": "0.8.0", "clip_sample": False, "set_alpha_to_one": False,
    "prediction_type": "v_prediction", "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None, **LATENT,
}  # fmt: skip
DIT_XL = {
    "_class_name": "DDIMScheduler", "_diffusers_version": "0.12.0.dev0", "beta_start": 0.0001, "beta_end": 0.02,
    "beta_schedule": "linear", "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "epsilon",
    "set_alpha_to_one": True, "steps_offset": 0, "trained_betas": None,
}  # fmt: skip
CIFAR10 = {
    "_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_start": 0.0001, "beta_end": 0.02,
    "beta_schedule": "linear", "clip_sample": True, "num_train_timesteps": 1000, "timestep_values": None,
    "trained_betas": None, "variance_type": "fixed_large",
}  # fmt: skip
PIXART = {
    "_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "beta_start": 0.0001, "beta_end": 0.02,
    "beta_schedule": "linear", "euler_at_final": False, "lambda_min_clipped": -math.inf, "lower_order_final": True,
    "num_train_timesteps": 1000, "prediction_type": "epsilon", "solver_order": 2, "solver_type": "midpoint",
    "thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0, "timestep_spacing": "linspace",
    "use_karras_sigmas": False, "use_lu_lambdas": False, "variance_type": None,
}  # fmt: skip
SDXL = {
    "_class_name": "EulerDiscreteScheduler", "clip_sample": False, "interpolation_type": "linear",
    "prediction_type": "epsilon", "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True,
    "steps_offset": 1, "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False, **LATENT,
}  # fmt: skip
SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}
FLUX_DEV = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "base_image_seq_len": 256, "base_shift": 0.5,
    "max_image_seq_len": 4096, "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True,
}  # fmt: skip
FLUX_SCHNELL = FLUX_DEV | {"shift": 1.0, "use_dynamic_shifting": False}
UNIPC = {"_class_name": "UniPCMultistepScheduler", **LATENT}

ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
KARRAS = {"use_karras_sigmas": True}
TRAILING, LINSPACE, SAMPLE = (
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
    {"prediction_type": "sample"},
)
V = {"prediction_type": "v_prediction"}
CASES = {
    "sd14": SD14, "sd14 v": SD14 | V, "pndm linspace": SD14 | LINSPACE, "pndm trailing": SD14 | TRAILING,
    "pndm runge-kutta": SD14 | {"skip_prk_steps": False, "steps_offset": 0},
    "sd21": SD21, "dit": DIT_XL, "ddim clipped": DIT_XL | {"clip_sample": True, "clip_sample_range": 2.0},
    "ddim sample": DIT_XL | SAMPLE, "ddim linspace": DIT_XL | LINSPACE, "ddim zero snr": SD21 | ZERO_SNR,
    "ddim thresholded": DIT_XL | {"thresholding": True, "sample_max_value": 3.0},
    "cifar10": CIFAR10, "ddpm small": CIFAR10 | {"variance_type": "fixed_small"} | LINSPACE, "ddpm v": CIFAR10 | V | TRAILING,
    "ddpm small log": CIFAR10 | SAMPLE | {"variance_type": "fixed_small_log", "steps_offset": 1, "clip_sample": False},
    "pixart": PIXART, "dpm v order 3": PIXART | V | {"solver_order": 3}, "dpm karras": PIXART | KARRAS | LATENT,
    "dpm heun": PIXART | SAMPLE | {"solver_type": "heun", "euler_at_final": True},
    "dpm without ++": PIXART | {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    "dpm lu trailing": PIXART | TRAILING | {"use_lu_lambdas": True}, "dpm cosine": PIXART | {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
    "unipc": UNIPC, "unipc v": UNIPC | V | {"solver_order": 3, "disable_corrector": [0, 2]},
    "unipc bh1": UNIPC | {"solver_type": "bh1", "final_sigmas_type": "sigma_min", "predict_x0": False},
    "unipc karras": UNIPC | KARRAS, "unipc betas": UNIPC | {"trained_betas": [0.001 + 1e-5 * k for k in range(1000)]},
    "sdxl": SDXL, "euler v trailing": SDXL | V | TRAILING, "euler linspace": SDXL | LINSPACE, "euler karras": SDXL | KARRAS,
}  # fmt: skip
STOCHASTIC = {"DDPMScheduler"}


class Recorded(nn.Module):
    """Keep what a denoiser is called with, as a pipeline calls it or as we do."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.inputs: list[torch.Tensor] = []
        self.times: list[float] = []
        network.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, module, args, kwargs) -> None:
        named = dict(zip(("sample", "timestep"), args)) | kwargs
        x = named["hidden_states"] if "hidden_states" in named else named["sample"]
        self.inputs.append(x.detach().clone())
        self.times.append(float(torch.as_tensor(named["timestep"]).flatten()[0]))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@torch.no_grad()
def loop(config: dict, network, x: torch.Tensor, steps: int, eta: float, generator) -> tuple[list, list, torch.Tensor]:
    """The inputs, times and end of the loop that all pipelines of diffusion models share."""
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    scheduler.set_timesteps(steps)
    extra = {"eta": eta} if eta else {}
    if eta or config["_class_name"] in STOCHASTIC:
        extra["generator"] = generator
    x, inputs = x * scheduler.init_noise_sigma, []
    for t in scheduler.timesteps:
        inputs.append(scheduler.scale_model_input(x, t))
        x = scheduler.step(network(inputs[-1], t), t, x, **extra).prev_sample
    return inputs, scheduler.timesteps.tolist(), x


def small_network():
    """A random network of x and t whose output differs at every time."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)

    def network(x, t):
        phase = torch.as_tensor(t, dtype=torch.float32).reshape(-1, 1, 1, 1) / 500
        return second((first(x / (1 + x.abs().amax((1, 2, 3), keepdim=True))) + phase).sin())

    return network


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of dpmsolver without ++
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("name", CASES)
def test_a_run_equals_the_loop_of_a_pipeline_call_by_call(name, steps):
    config, network, x = CASES[name], small_network(), randn(2, 2, 6, 6)
    inputs, times, end = loop(config, network, x, steps, 0.0, torch.Generator().manual_seed(7))
    sampler = sampler_of(config, steps)
    generator = torch.Generator().manual_seed(7)
    seen = []

    def denoise(x, t):
        seen.append(x)
        return network(x, t)

    ours = sampler.run(denoise, x, lambda k: torch.randn(x.shape, generator=generator))
    assert sampler.timesteps == pytest.approx(times, abs=0)
    assert len(seen) == len(inputs) == len(sampler.step_of_call)
    for one, other in zip([*seen, ours], [*inputs, end], strict=True):
        close(one, other, 5e-5)  # Euler's states are scaled back and forth between the calls


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("config", [SD21, DIT_XL], ids=["sd21", "dit"])
def test_eta_adds_the_noise_of_ddim(config, eta):
    network, x = small_network(), randn(2, 2, 6, 6)
    end = loop(config, network, x, 10, eta, torch.Generator().manual_seed(7))[2]
    generator = torch.Generator().manual_seed(7)
    close(sampler_of(config, 10, eta).run(network, x, lambda k: torch.randn(x.shape, generator=generator)), end)


@pytest.mark.parametrize("config", [SD21, SD14 | V, DIT_XL | SAMPLE], ids=["sd21", "pndm v", "sample"])
def test_states_keep_their_type(config):
    """In float64 a run equals diffusers to the last digits."""
    network, x = small_network(), randn(2, 2, 6, 6)
    linear = lambda x, t: 0.5 * x.sin() * torch.as_tensor(t).reshape(-1, 1, 1, 1) / 1000
    end = loop(config, linear, x.double(), 10, 0.0, None)[2]
    ours = sampler_of(config, 10).run(linear, x.double())
    assert ours.dtype == torch.float64
    close(ours, end, 1e-12)
    assert sampler_of(config, 10).run(network, x).dtype == torch.float32


def test_steps_of_pndm_that_make_several_calls():
    assert sampler_of(SD14, 4).step_of_call == [0, 0, 1, 2, 3]
    prk = sampler_of(CASES["pndm runge-kutta"], 6)
    assert prk.step_of_call == [0] * 4 + [1] * 4 + [2] * 4 + [3, 4, 5]
    first = dict(reversed(list(zip(prk.step_of_call, prk.timesteps, strict=True))))
    assert [first[step] for step in range(6)] == [830, 664, 498, 332, 166, 0]


def recorded(network: nn.Module) -> tuple[nn.Module, Recorded]:
    return network, Recorded(network)


def same_calls(theirs: Recorded, ours: Recorded, tolerance: float = 1e-5) -> None:
    assert len(ours.inputs) == len(theirs.inputs) > 1
    assert ours.times == pytest.approx(theirs.times, rel=1e-6)
    for one, other in zip(ours.inputs, theirs.inputs, strict=True):
        close(one, other, tolerance)


@pytest.mark.parametrize("config", [CIFAR10, CIFAR10 | {"variance_type": "fixed_small"}], ids=["large", "small"])
def test_a_ddpm_pipeline(config):
    network, theirs = recorded(tiny_unet())
    pipeline = diffusers.DDPMPipeline(network, diffusers.DDPMScheduler.from_config(config))
    pipeline.set_progress_bar_config(disable=True)
    pipeline(2, torch.Generator().manual_seed(3), num_inference_steps=5, output_type="np")
    mine, ours = recorded(tiny_unet())
    generator = torch.Generator().manual_seed(3)
    draw = lambda k=None: torch.randn(2, 3, 8, 8, generator=generator)
    sampler_of(config, 5).run(mine, draw(), draw)
    same_calls(theirs, ours)


@pytest.mark.parametrize("config", [CIFAR10, SD14, SD21], ids=["ddpm", "pndm", "ddim"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_a_ddim_pipeline_makes_ddim_of_any_scheduler(config, eta):
    network, theirs = recorded(tiny_unet())
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    pipeline = diffusers.DDIMPipeline(network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline(2, torch.Generator().manual_seed(3), eta=eta, num_inference_steps=5, output_type="np")
    mine, ours = recorded(tiny_unet())
    generator = torch.Generator().manual_seed(3)
    draw = lambda k=None: torch.randn(2, 3, 8, 8, generator=generator)
    sampler_of(config, 5, eta, pipeline="DDIMPipeline").run(mine, draw(), draw)
    same_calls(theirs, ours)


@pytest.mark.parametrize(
    "name", ["sd14", "sd21", "dit", "ddim clipped", "unipc", "sdxl", "euler linspace", "dpm karras"]
)
def test_a_stable_diffusion_pipeline(name):
    pytest.importorskip("transformers")
    network, theirs = recorded(conditional_unet(in_channels=4, out_channels=4))
    scheduler = getattr(diffusers, CASES[name]["_class_name"]).from_config(CASES[name])
    pipeline = diffusers.StableDiffusionPipeline(None, None, None, network, scheduler, None, None, None, False)
    pipeline.set_progress_bar_config(disable=True)
    x, tokens = randn(2, 4, 8, 8), randn(2, 4, 6, seed=1)
    end = pipeline(
        prompt_embeds=tokens,
        latents=x,
        num_inference_steps=6,
        guidance_scale=1,
        output_type="latent",
        height=64,
        width=64,
    ).images
    mine, ours = recorded(conditional_unet(in_channels=4, out_channels=4))
    sampler = sampler_of(CASES[name], 6, pipeline="StableDiffusionPipeline")
    made = sampler.run(lambda x, t: mine(x, t, encoder_hidden_states=tokens), x)
    same_calls(theirs, ours, 5e-5)
    close(made, end, 5e-5)


def test_a_dit_pipeline():
    from edadm.tasks.first_stage import first_stage_config

    network, theirs = recorded(diffusion_transformer())
    vae = random_model(*first_stage_config(FIRST_STAGES["kl"], 1.0))
    vae.decode = lambda latents: diffusers.models.autoencoders.vae.DecoderOutput(latents[:, :1].repeat(1, 3, 1, 1))
    pipeline = diffusers.DiTPipeline(network, vae, diffusers.DDIMScheduler.from_config(DIT_XL))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    pipeline([1, 2], guidance_scale=1, generator=generator, num_inference_steps=5, output_type="np")
    mine, ours = recorded(diffusion_transformer())
    labels = torch.tensor([1, 2])
    x = randn(2, 2, 8, 8, seed=3)
    sampler_of(DIT_XL, 5).run(lambda x, t: mine(x, timestep=t, class_labels=labels), x)
    same_calls(theirs, ours)


@pytest.mark.parametrize(
    "config",
    [SD3, SD3 | {"shift": 1.0}, FLUX_DEV, FLUX_DEV | {"time_shift_type": "linear"}],
    ids=["shift 3", "no shift", "dynamic", "dynamic linear"],
)
def test_a_stable_diffusion_3_pipeline(config):
    pytest.importorskip("transformers")
    network, theirs = recorded(sd3_transformer())
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    nothing = [None] * 7
    pipeline = diffusers.StableDiffusion3Pipeline(network, scheduler, *nothing)
    pipeline.set_progress_bar_config(disable=True)
    x, text = randn(2, 2, 8, 8), {"prompt_embeds": randn(2, 4, 6, seed=1), "pooled_prompt_embeds": randn(2, 5, seed=2)}
    end = pipeline(
        **text, latents=x, num_inference_steps=6, guidance_scale=1, output_type="latent", height=64, width=64
    ).images
    mine, ours = recorded(sd3_transformer())
    sampler = sampler_of(config, 6, denoiser="SD3Transformer2DModel", tokens=16)
    named = {"encoder_hidden_states": text["prompt_embeds"], "pooled_projections": text["pooled_prompt_embeds"]}
    made = sampler.run(lambda x, t: mine(x, timestep=t, **named), x)
    same_calls(theirs, ours)
    close(made, end)


@pytest.mark.parametrize("config", [FLUX_DEV, FLUX_SCHNELL], ids=["dev", "schnell"])
def test_a_flux_pipeline(config):
    pytest.importorskip("transformers")
    network, theirs = recorded(flux_transformer())
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    pipeline = diffusers.FluxPipeline(scheduler, None, None, None, None, None, network)
    pipeline.set_progress_bar_config(disable=True)
    x, text, pooled = randn(2, 16, 4), randn(2, 4, 6, seed=1), randn(2, 5, seed=2)
    end = pipeline(
        prompt_embeds=text, pooled_prompt_embeds=pooled, latents=x, num_inference_steps=6, guidance_scale=3.5,
        output_type="latent", height=64, width=64,
    ).images  # fmt: skip
    mine, ours = recorded(flux_transformer())
    rows = torch.arange(4)
    ids = torch.stack([torch.zeros(16), rows.repeat_interleave(4), rows.repeat(4)], dim=1)
    named = {"encoder_hidden_states": text, "pooled_projections": pooled, "guidance": torch.full((2,), 3.5)}
    named |= {"img_ids": ids, "txt_ids": torch.zeros(4, 3)}
    sampler = sampler_of(config, 6, denoiser="FluxTransformer2DModel", tokens=16)
    made = sampler.run(lambda x, t: mine(x, timestep=t, **named), x)
    assert max(ours.times) == 1
    same_calls(theirs, ours)
    close(made, end)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_class_name": "HeunDiscreteScheduler"},
            r"scheduler is HeunDiscreteScheduler, reproduced are DDIM.*sampler=",
        ),
        ({}, r"scheduler is None, reproduced are"),
        (
            CIFAR10 | {"variance_type": "learned_range"},
            r"DDPMScheduler with variance_type=learned_range .*fixed_small or",
        ),
        (CIFAR10 | {"thresholding": True}, r"DDPMScheduler with thresholding=True is not reproduced.*sampler="),
        (PIXART | {"algorithm_type": "sde-dpmsolver++"}, r"algorithm_type=sde-dpmsolver\+\+ is not .*dpmsolver\+\+ or"),
        (PIXART | {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "use_flow_sigmas=True"),
        (
            UNIPC | {"prediction_type": "flow_prediction"},
            "UniPCMultistepScheduler with prediction_type=flow_prediction",
        ),
        (SDXL | {"timestep_type": "continuous"}, "timestep_type=continuous is not reproduced, only discrete"),
        (SD14 | SAMPLE, "PNDMScheduler steps with epsilon or v_prediction"),
        (SD14 | {"new_option": 3}, r"PNDMScheduler has no option new_option .*new_option=3"),
        (SD14 | {"beta_schedule": "spiral"}, r"cannot build the PNDMScheduler .*spiral"),
        (SD3 | {"stochastic_sampling": True}, "stochastic_sampling=True is not reproduced, only False"),
        (SD3 | {"use_karras_sigmas": True}, "use_karras_sigmas=True is not reproduced"),
    ],
)
def test_what_is_not_reproduced_is_named_with_what_is(config, message):
    with pytest.raises(EdadmError, match=message):
        sampler_of(config, 10)


def test_eta_is_for_ddim_only():
    with pytest.raises(
        EdadmError, match=r"eta is 0\.5, which only DDIM has, the pipeline's scheduler is PNDMScheduler"
    ):
        sampler_of(SD14, 10, 0.5)
    for eta in (-1.0, 2.0, math.nan):
        with pytest.raises(EdadmError, match="choose 0"):
            sampler_of(DIT_XL, 10, eta)


def test_flows_need_to_know_their_network_and_its_tokens():
    with pytest.raises(EdadmError, match=r"SD3Transformer2DModel and FluxTransformer2DModel, .* this is a None"):
        sampler_of(SD3, 10)
    with pytest.raises(EdadmError, match="depends on the image size: give its tokens"):
        sampler_of(FLUX_DEV, 10, denoiser="FluxTransformer2DModel")
    assert sampler_of(FLUX_SCHNELL, 4, denoiser="FluxTransformer2DModel") == FlowEuler(4, 1.0, None, 1.0)


@pytest.mark.parametrize(
    ("config", "steps"),
    [(SD14, 0), (SD14, 1000), (DIT_XL, 1001), (CASES["pndm runge-kutta"], 3), (UNIPC, 0), (UNIPC, 2000)],
    ids=["none", "offset beyond the training", "too many", "runge-kutta", "none of unipc", "more than trained"],
)
def test_impossible_numbers_of_steps_are_named_at_once(config, steps):
    with pytest.raises(EdadmError, match=f"{steps} steps"):
        sampler_of(config, steps)


def test_the_key_of_a_sampler_holds_every_option():
    from edadm.parts import identity

    key = identity(sampler_of(PIXART, 20))
    assert key["scheduler"] == "DPMSolverMultistepScheduler" and "prediction_type" not in key
    assert key["options"]["solver_order"] == 2 and key["options"]["final_sigmas_type"] == "zero"  # its own default
    assert json.loads(json.dumps(key)) == key
    others = [PIXART | {"solver_order": 3}, PIXART | V, PIXART | {"lambda_min_clipped": -5.1}]
    assert len({content_hash(identity(sampler_of(config, 20))) for config in [PIXART, *others]}) == 4
    assert identity(sampler_of(PIXART | V, 20))["prediction_type"] == "v_prediction"


def test_another_prediction_is_another_sampler_of_the_same_scheduler():
    noise = sampler_of(SD21 | {"prediction_type": "epsilon"}, 10)
    assert isinstance(noise, SchedulerSampler)
    assert noise.predicting("v_prediction") == sampler_of(SD21, 10)

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from baselines import ptq4dm
from edadm import config
from edadm.errors import EdadmError
from edadm.keys import Run
from edadm.parts import identity
from edadm.sampling.ddim import Sampler
from edadm.sampling.guidance import ClassConditions
from edadm.sampling.interface import DiffusionSampler
from edadm.store import Store
from edadm.tasks.cifar10_tiny import cifar10_tiny
from edadm.tasks.released import as_released

SAMPLERS = [name for name in config.options("sampler") if name not in ("flow_euler", "own")]  # which have no betas


def run_of(*words: str, **task_fields) -> Run:
    settings = config.settings(config.compose(words), words)
    return Run(settings, dataclasses.replace(cifar10_tiny(), **task_fields), Store(Path("unused")), "cpu", 1)


def with_calibration_sampler(run: Run, **part) -> Run:
    values = {**run.settings.values, "calibration_sampler": part}
    return dataclasses.replace(run, settings=dataclasses.replace(run.settings, values=values))


def test_the_samplers_of_cifar10_keep_their_identity():
    numbers = {"steps": 20, "eta": 0.0, "beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
    for spacing in ("quad", "uniform"):
        made = identity(run_of(f"sampler=ddim_{spacing}").sampler)
        assert made == {
            "part": "edadm.sampling.ddim.Sampler",
            "version": 1,
            "spacing": spacing,
            "train_steps": 1000,
            **numbers,
        }


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_of_the_configuration_is_built_with_the_schedule_of_the_model(name):
    sampler = run_of(f"sampler={name}", "sampler.steps=5", learned_variance=True).sampler
    assert isinstance(sampler, DiffusionSampler) and sampler.steps == 5
    assert len(sampler.timesteps) == 5 + (name == "plms")
    assert (sampler.beta_schedule, sampler.beta_start, sampler.beta_end) == ("linear", 0.0001, 0.02)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_takes_the_schedule_that_a_model_names(name):
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}
    words = [f"sampler={name}", *(f"+model.{key}={value}" for key, value in schedule.items())]
    sampler = run_of(*words, learned_variance=True).sampler
    assert {key: getattr(sampler, key) for key in schedule} == schedule


def test_what_is_predicted_is_part_of_the_key_where_it_is_not_noise():
    noise, velocity = run_of(), run_of(prediction_type="v_prediction")
    assert "prediction_type" not in noise.protocol["sampler"]
    assert velocity.protocol["sampler"] == noise.protocol["sampler"] | {"prediction_type": "v_prediction"}
    for key in ("trajectories", "images", "evaluation"):
        assert velocity.hash_of(key) != noise.hash_of(key)


def test_a_flow_takes_the_sampler_of_flows():
    sampler = run_of("sampler=flow_euler", "+model.flow_time_scale=1", prediction_type="flow_prediction").sampler
    assert (sampler.shift, sampler.last_sigma, sampler.time_scale) == (3.0, None, 1)


def test_a_sampler_that_does_not_fit_the_model_is_an_error():
    with pytest.raises(EdadmError, match=r"Sampler steps with epsilon .* predicts flow_prediction: choose .*flow_eul"):
        _ = run_of(prediction_type="flow_prediction").hash
    with pytest.raises(EdadmError, match="FlowEuler steps with flow_prediction, this model predicts epsilon"):
        _ = run_of("sampler=flow_euler").hash
    with pytest.raises(EdadmError, match="RespacedDDPM needs the variance"):
        _ = run_of("sampler=ddpm_respaced").hash


def test_a_number_of_steps_that_the_original_cannot_make_is_an_error():
    with pytest.raises(EdadmError, match="36 steps"):
        _ = run_of("sampler=ddim_leading", "sampler.steps=36").hash


def test_guidance_of_an_unconditional_model_is_an_error():
    with pytest.raises(EdadmError, match=r"sampler\.guidance_scale=3, but the model of task cifar10_tiny is uncond"):
        _ = run_of("sampler.guidance_scale=3").hash
    assert run_of().guidance is None and "guidance" not in run_of().protocol


def test_guidance_is_part_of_what_is_sampled_with_it():
    def run(scale: float) -> Run:
        return run_of(f"sampler.guidance_scale={scale}", conditions=lambda: ClassConditions(10, 10), guided_channels=3)

    guidance = run(3.0).guidance
    assert (guidance.scale, guidance.channels, guidance.conditions.classes) == (3.0, 3, 10)
    for key in ("trajectories", "images", "evaluation"):
        assert run(3.0).hash_of(key) != run(1.0).hash_of(key) != run_of().hash_of(key)
    assert run(3.0).protocol["guidance"]["scale"] == 3.0 and run(3).hash == run(3.0).hash


def test_calibration_keeps_its_own_sampler_and_guidance():
    run = run_of("sampler=plms", "sampler.guidance_scale=2", conditions=lambda: ClassConditions(10, 10))
    part = {"name": "ddim_uniform", "spacing": "uniform", "steps": 10, "guidance_scale": 3.0}
    own = with_calibration_sampler(run, **part)
    assert run.calibration_sampler == run.sampler and own.sampler == run.sampler
    assert own.calibration_sampler == Sampler("uniform", 10) and own.calibration_sampling["name"] == "ddim_uniform"
    assert (own.calibration_guidance.scale, own.guidance.scale) == (3.0, 2.0)
    assert own.hash_of("trajectories") != run.hash_of("trajectories")
    assert own.hash_of("evaluation") == run.hash_of("evaluation")
    other = with_calibration_sampler(run_of("sampler=dpm_solver", conditions=run.task.conditions), **part)
    assert other.hash_of("trajectories") == own.hash_of("trajectories")


def test_features_of_the_first_batches_only_are_other_trajectories():
    plain, first = run_of(), run_of("+recipe.tdac.feature_batches=1")
    assert (plain.feature_batches, first.feature_batches) == (None, 1)
    assert plain.hash_of("trajectories") != first.hash_of("trajectories")


def test_the_shape_of_a_sample_tells_runs_apart():
    small, large = run_of(), run_of(sample_shape=(3, 64, 64))
    for key in ("trajectories", "calibration", "quantized", "images", "evaluation", "metrics"):
        assert small.hash_of(key) != large.hash_of(key)
    assert small.hash != large.hash and small.protocol != large.protocol


def test_a_part_is_known_by_its_class_and_where_that_is_defined():
    @dataclasses.dataclass(frozen=True)
    class Normal:
        mean: float = 0.4
        std: float = 0.4
        version: int = 1

    assert identity(Normal())["part"] != identity(ptq4dm.Normal())["part"] == "baselines.ptq4dm.Normal"


def test_what_only_calibration_depends_on_leaves_the_images_alone():
    conditions = ClassConditions(10, 10)
    choices = [as_released(conditions, choice, 1234) for choice in ("disjoint", "released")]
    own, released = (run_of(conditions=lambda made=made: made) for made in choices)
    assert own.hash_of("trajectories") != released.hash_of("trajectories")
    assert own.hash_of("evaluation") == released.hash_of("evaluation") and own.protocol == released.protocol


def test_steps_are_compared_where_that_is_asked_for():
    without = ("metrics.names=[psnr]",)
    assert run_of(*without).hash == run_of(*without, "metrics.sqnr_rows=7").hash
    assert run_of().hash != run_of("metrics.sqnr_rows=7").hash
    assert run_of().compares_steps and not run_of(*without).compares_steps and not run_of("method=fp").compares_steps


def test_tf32_is_part_of_every_key_where_it_is_on():
    assert run_of("tf32=true").hash_of("trajectories") != run_of().hash_of("trajectories")
    assert "tf32" not in run_of().key("trajectories")

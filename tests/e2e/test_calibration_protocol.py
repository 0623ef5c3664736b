"""Another sampler of the images never changes the calibration unseen."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from edadm import config, experiment, records, stages
from edadm.calibration.rows import CalibrationSet
from edadm.keys import Run

Toy = Callable[..., Run]
FAST = ("dpm_solver", "dpm_solver_pp", "plms", "unipc")
OWN = [
    task for task in config.options("task") if "calibration_sampler" in (config.CONF / f"task/{task}.yaml").read_text()
]


@pytest.mark.parametrize("words", [(), ("sampler@calibration_sampler=ddim_uniform", "calibration_sampler.steps=5")])
def test_a_record_names_the_sampler_of_the_images_and_that_of_the_calibration(toy: Toy, words: tuple[str, ...]) -> None:
    run = toy("method=rtn", "sampler=dpm_solver", "sampler.steps=3", *words)
    record = records.read(experiment.execute(run))
    expected = ("ddim_uniform", 5) if words else ("dpm_solver", 3)
    named = record.config["calibration_sampler"]
    assert (named["name"], named["steps"]) == expected
    assert (record.config["sampler"]["name"], record.config["sampler"]["steps"]) == ("dpm_solver", 3)
    assert record.protocol["sampler"]["part"] == "edadm.sampling.multistep.DPMSolver"
    assert record.variant.get("calibration_sampler") == (expected[0] if words else None)
    rows, facts = CalibrationSet.load(run.store.find("calibration", run.key("calibration")) / stages.CALIBRATION)
    assert facts["sampler"] == expected[0] and int(rows.step.max()) < expected[1]


def test_rows_are_those_of_their_own_sampler_whatever_samples_the_images(toy: Toy) -> None:
    own = ("sampler@calibration_sampler=ddim_quad", "calibration_sampler.steps=4")
    runs = [toy(f"sampler={sampler}", *own) for sampler in ("ddim_quad", *FAST)]
    assert len({run.hash_of("calibration") for run in runs}) == len({run.hash_of("quantized") for run in runs}) == 1
    assert len({run.hash_of("images") for run in runs}) == len(runs)
    follows = [toy(f"sampler={sampler}").hash_of("calibration") for sampler in ("ddim_quad", *FAST)]
    assert len(set(follows)) == len(follows)  # without one of its own, calibration follows the images


@pytest.mark.parametrize("task", OWN)
def test_a_fast_sampler_leaves_the_calibration_of_a_task_with_its_own(task: str) -> None:
    standard = config.compose([f"task={task}"])
    assert standard.calibration_sampler == standard.sampler
    fast = config.compose([f"task={task}", "sampler=dpm_solver_pp", "sampler.steps=7"])
    assert fast.calibration_sampler == standard.calibration_sampler and fast.sampler != standard.sampler

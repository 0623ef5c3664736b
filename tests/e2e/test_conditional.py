"""A class-conditional and a text-conditional denoiser from trajectories to images, with guidance and fast samplers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edadm import config, stages
from edadm.calibration.rows import CalibrationSet
from edadm.calibration.trajectories import Trajectories
from edadm.keys import Run
from edadm.metrics.paired import SQNR_CAP
from edadm.sampling.guidance import ClassConditions, Condition, Conditions
from edadm.sampling.noise import CALIBRATION, numpy_rng
from edadm.store import Store
from edadm.tasks.base import Task
from tests.e2e.toy_task import words
from tests.toys import conditional_unet, diffusion_transformer

Toy = Callable[..., Run]


@dataclass(frozen=True)
class Prompts:
    """Four tokens per image, as from a text encoder."""

    @property
    def null(self) -> Condition:
        return {"encoder_hidden_states": torch.zeros(1, 4, 6)}

    def rows(self, stream: str, seed: int, numbers: Sequence[int]) -> Condition:
        tokens = [numpy_rng(f"{stream}/prompts", seed, n).standard_normal((4, 6), dtype=np.float32) for n in numbers]
        return {"encoder_hidden_states": torch.from_numpy(np.stack(tokens))}

    def identity(self, stream: str) -> dict[str, Any]:
        return {"part": "Prompts"}


@dataclass(frozen=True)
class Kind:
    """A family of denoisers, and what images of it are of."""

    build: Callable[[], torch.nn.Module]
    shape: tuple[int, int, int]
    conditions: Callable[[], Conditions]
    feature: str
    learned_variance: bool = False
    guided_channels: int | None = None

    def load(self, folder: Path) -> torch.nn.Module:
        return self.build()

    def task(self, folder: Path) -> Task:
        return Task(
            "toy", folder, self.shape, self.load, learned_variance=self.learned_variance, conditions=self.conditions,
            guided_channels=self.guided_channels,
        )  # fmt: skip


TOKEN = torch.linspace(-1, 1, 4 * 6).view(4, 6)
KINDS = {
    "classes as a token": Kind(
        conditional_unet, (3, 8, 8), lambda: ClassConditions(3, 3, TOKEN), "mid_block.resnets.0"
    ),
    "text": Kind(conditional_unet, (3, 8, 8), Prompts, "mid_block.resnets.0"),
    "dit": Kind(diffusion_transformer, (2, 8, 8), lambda: ClassConditions(3, 3), "transformer_blocks.0", True, 1),
}
SMALL = ("method=edadm", "sampler.guidance_scale=3", "chunk=4", "profile.rows=6", "n_images=5", "profile.batch=4")


@pytest.fixture(params=KINDS)
def kind(request) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def conditional(toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind) -> Toy:
    """Make a toy run of the conditional denoiser, with a cache of its own."""
    monkeypatch.setenv("EDADM_CACHE", str(tmp_path / "cache"))

    def make(*more: str) -> Run:
        given = {word.split("=")[0] for word in more}
        small = [word for word in SMALL if word.split("=")[0] not in given]
        line = words(toy_model, tmp_path, *small, f"preset.tdac.feature={kind.feature}", *more)
        return Run(config.settings(config.compose(line), line), kind.task(toy_model), Store(), "cpu", 1)

    return make


def quantize(run: Run) -> tuple[stages.Result, ...]:
    sampled = stages.trajectories(run)
    calibrated = stages.calibration(run, sampled)
    return sampled, calibrated, stages.quantized(run, calibrated)


def test_calibration_rows_carry_the_condition_of_their_trajectory(conditional: Toy, kind: Kind) -> None:
    run = conditional()
    sampled, calibrated, _ = quantize(run)
    along = Trajectories.load(sampled.folder / stages.TRAJECTORIES)
    rows, _ = CalibrationSet.load(calibrated.folder / stages.CALIBRATION)
    (name, expected), *others = kind.conditions().rows(CALIBRATION, run.settings["seed"], range(6)).items()
    assert not others and torch.equal(along.condition[name], expected) and along.features.shape[1] == 12
    assert torch.equal(rows.condition[name], expected)  # TDAC: row j is of trajectory j
    assert torch.equal(rows.null[name], kind.conditions().null[name])
    assert len(rows) == 6 and len(rows.inputs()[0]) == 12


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [("text", "plms"), ("dit", "unipc"), *(("classes as a token", s) for s in ("dpm_solver", "ddim_leading"))],
    indirect=["kind"],
)
def test_images_are_of_their_condition_whatever_the_sampler(conditional: Toy, sampler: str) -> None:
    run = conditional(f"sampler={sampler}", "method=rtn")
    network = quantize(run)[-1]
    guided = stages.read_images(stages.images(run, network))
    fewer = conditional(f"sampler={sampler}", "method=rtn", "n_images=3")
    other = stages.read_images(stages.images(fewer, network))
    assert guided.shape == (5, *run.task.sample_shape) and guided.float().std() > 5
    assert torch.equal(guided[:3], other)
    plain = conditional(f"sampler={sampler}", "method=rtn", "sampler.guidance_scale=1")
    assert not torch.equal(stages.read_images(stages.images(plain, quantize(plain)[-1])), guided)


def test_the_error_of_every_call_is_that_of_the_guided_noise(conditional: Toy) -> None:
    run = conditional("sampler=dpm_solver")
    network, along = quantize(run)[-1], stages.evaluation(run)
    measured = stages.read_sqnr(stages.sqnr(run, network, along))
    assert list(measured.timesteps) == pytest.approx(run.sampler.timesteps, abs=0)
    assert all(0 < value < 100 for value in measured.values), measured.values
    full_precision = conditional("sampler=dpm_solver", "seed=7")  # a key of its own; the same evaluation
    same = stages.read_sqnr(stages.sqnr(full_precision, None, along))
    assert same.values == [SQNR_CAP] * len(run.sampler.timesteps)


@pytest.mark.parametrize("kind", ["dit"], indirect=True)
def test_dit_is_sampled_with_its_learned_variance(conditional: Toy) -> None:
    run = conditional("sampler=ddpm_respaced", "method=rtn")
    made = stages.read_images(stages.images(run, quantize(run)[-1]))
    assert made.shape == (5, 2, 8, 8) and made.float().std() > 5

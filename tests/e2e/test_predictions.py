"""Networks that predict a velocity, the clean sample or a flow, from trajectories to images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edadm import config, stages
from edadm.calibration.rows import CalibrationSet
from edadm.keys import Run
from edadm.metrics.paired import SQNR_CAP
from edadm.sampling.guidance import Condition
from edadm.sampling.noise import EVALUATION, numpy_rng
from edadm.store import Store
from edadm.tasks.base import Task, noise_prediction
from edadm.tasks.pipeline_calls import adapt
from tests.e2e.toy_task import words
from tests.toys import sd3_transformer, tiny_unet


@dataclass(frozen=True)
class Texts:
    """Tokens and a pooled text per image, as SD3 takes them."""

    null: Condition | None = None
    shapes: dict[str, tuple[int, ...]] = field(
        default_factory=lambda: {"encoder_hidden_states": (4, 6), "pooled_projections": (5,)}
    )

    def rows(self, stream: str, seed: int, numbers: Sequence[int]) -> Condition:
        def draw(name: str, number: int) -> np.ndarray:
            return numpy_rng(f"{stream}/{name}", seed, number).standard_normal(self.shapes[name], dtype=np.float32)

        return {name: torch.from_numpy(np.stack([draw(name, n) for n in numbers])) for name in self.shapes}

    def identity(self, stream: str) -> dict[str, Any]:
        return {"part": "Texts"}


def unet(prediction: str, folder: Path) -> Task:
    return Task("toy", folder, (3, 8, 8), lambda place: tiny_unet(), prediction_type=prediction)


def sd3(prediction: str, folder: Path) -> Task:
    def load(place: Path) -> torch.nn.Module:
        return adapt(sd3_transformer(), "SD3Transformer2DModel", (2, 8, 8))

    return Task("toy", folder, (2, 8, 8), load, prediction_type=prediction, conditions=Texts)


UNET, SD3 = "mid_block.resnets.0", "transformer_blocks.0.attn.to_q"  # the modules that TDAC reads
KINDS: dict[str, tuple[Callable[[str, Path], Task], str, str, str, str]] = {
    "velocity": (unet, "v_prediction", "ddim_quad", UNET, "edadm"),
    "velocity, fractional times": (unet, "v_prediction", "dpm_solver", UNET, "rtn"),
    "sample": (unet, "sample", "unipc", UNET, "rtn"),
    "flow": (sd3, "flow_prediction", "flow_euler", SD3, "edadm"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_errors_are_those_of_the_networks_own_output(
    toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("EDADM_CACHE", str(tmp_path / "cache"))
    make, prediction, sampler, feature, method = KINDS[kind]
    line = words(
        toy_model, tmp_path, f"method={method}", f"sampler={sampler}", f"preset.tdac.feature={feature}", "n_images=5"
    )
    run = Run(config.settings(config.compose(line), line), make(prediction, toy_model), Store(), "cpu", 1)
    calibrated = stages.calibration(run, stages.trajectories(run))
    rows, _ = CalibrationSet.load(calibrated.folder / stages.CALIBRATION)
    assert set(rows.timestep.tolist()) <= set(run.sampler.timesteps)
    network = stages.quantized(run, calibrated)
    made = stages.read_images(stages.images(run, network))
    assert made.shape == (5, *run.task.sample_shape) and made.float().std() > 5

    along = stages.evaluation(run)
    with np.load(along.folder / stages.ALONG) as file:
        t, x, seen = run.sampler.timesteps[1], torch.from_numpy(file["x"][1]), torch.from_numpy(file["eps"][1])
    condition = Texts().rows(EVALUATION, 1234, range(len(x))) if prediction == "flow_prediction" else {}
    with torch.no_grad():
        own = noise_prediction(run.task.denoiser())(x, torch.full((len(x),), t), **condition)
    torch.testing.assert_close(seen, own, rtol=1e-4, atol=1e-5)  # another memory layout of the convolutions

    measured = stages.read_sqnr(stages.sqnr(run, network, along))
    assert all(0 < value < SQNR_CAP for value in measured.values), measured.values

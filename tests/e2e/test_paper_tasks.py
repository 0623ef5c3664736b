"""The paper's tasks from the command line to the record, on models of their structure at a small width."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from edadm import config, experiment, records, stages
from edadm.errors import EdadmError
from edadm.keys import Run
from edadm.tasks.dit_checkpoint import convert_dit
from tests.tasks import originals
from tests.tasks.narrow import SHAPES, dit_folder, ldm_folder, pipeline_folder

SMALL = (
    "method=edadm", "bits=w4a8", "profile.steps=4", "profile.images=3", "profile.rows=4", "profile.batch=2",
    "profile.iterations=2", "profile.range_batches=2", "chunk=2", "metrics.names=[sqnr,psnr]", "metrics.sqnr_rows=2",
    "metrics.bootstrap=10", "threads=1", "device=cpu", "precision=fp32", "reference=null",
)  # fmt: skip
Make = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Prepare a small run of a task of the paper from words of the command line."""
    monkeypatch.setenv("EDADM_CACHE", str(tmp_path / "cache"))

    def prepare(task: str, model: Path, shape: tuple[int, ...], *more: str) -> Run:
        given = {word.split("=")[0] for word in more}
        small = [word for word in SMALL if word.split("=")[0] not in given]
        sizes = f"model.sample_shape=[{','.join(map(str, shape))}]"
        words = [f"task={task}", f"model.path={model}", sizes, f"results={tmp_path / 'results'}", *small, *more]
        return experiment.prepare(config.settings(config.compose(words), words))

    return prepare


@pytest.mark.slow
@pytest.mark.parametrize("task", ["lsun_bedroom_ldm4", "lsun_church_ldm8", "imagenet_ldm4"])
def test_a_latent_task_runs_from_its_folder_to_its_record(make: Make, tmp_path: Path, task: str) -> None:
    run = make(task, ldm_folder(task, tmp_path / "model"), SHAPES[task])
    record = records.read(experiment.execute(run, announce=True))
    assert record.status == "ok" and record.config["sampler"] == record.config["calibration_sampler"]
    assert record.metrics["sqnr"]["value"] > 0 and record.cost["macs"] > 0
    made = np.load(next((tmp_path / "cache").glob("images/*/" + stages.IMAGES)))
    factor = 8 if task == "lsun_church_ldm8" else 4
    assert made.dtype == np.uint8 and made.shape == (3, 3, *(factor * size for size in SHAPES[task][1:]))
    assert made.std() > 3


def test_dit_runs_with_its_learned_variance(make: Make, tmp_path: Path) -> None:
    features = ("model.features.middle_attention_input=transformer_blocks.0", "+task.classes=5")
    run = make("imagenet_dit", dit_folder(tmp_path / "model"), (4, 8, 8), *features)
    record = records.read(experiment.execute(run))
    assert record.status == "ok" and record.metrics["sqnr"]["value"] > 0


def test_embedders_that_the_original_dit_has_once_count_once(make: Make, tmp_path: Path) -> None:
    folder, state = dit_folder(tmp_path / "model"), originals.dit_state()
    network = convert_dit(state, originals.DIT, "dit.pt")
    network.save_pretrained(folder / "transformer")
    features = "model.features.middle_attention_input=transformer_blocks.0"
    run = make("imagenet_dit", folder, (4, 8, 8), features, "+task.classes=10")
    converted = experiment._cost(run, [])
    assert converted["parameters"] == sum(tensor.numel() for tensor in state.values())
    embedders = network.transformer_blocks[1].norm1.emb
    with torch.no_grad():
        for parameter in embedders.parameters():
            parameter.add_(1)
    network.save_pretrained(folder / "transformer")  # as one that diffusers has trained
    trained = experiment._cost(run, [])
    assert trained["parameters"] - converted["parameters"] == sum(p.numel() for p in embedders.parameters())
    assert trained["macs"] > converted["macs"]


@pytest.mark.parametrize(("method", "cache"), [("rtn", "auto"), ("edadm", "disk")])
def test_stable_diffusion_runs_with_prompts(make: Make, tmp_path: Path, method: str, cache: str) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "prompts.txt").write_text("\n".join(f"a {letter} b" for letter in "abcdefghijklmnopq"))
    words = (f"method={method}", f"reconstruction.cache={cache}", f"dataset.prompts={tmp_path / 'prompts.txt'}")
    run = make("coco_sd14", pipeline_folder(tmp_path / "model"), (4, 8, 8), *words)
    assert run.guidance is not None and run.guidance.scale == 7.5 and type(run.sampler).__name__ == "PLMS"
    record = records.read(experiment.execute(run))
    assert record.status == "ok" and record.metrics["sqnr"]["value"] > 0 and record.cost["macs"] > 0
    if method == "edadm":
        folder = tmp_path / "cache" / "quantized" / record.artefacts["quantized"]
        reports = json.loads((folder / stages.REPORTS).read_text())
        assert {report["iterations"] for report in reports} == {2} and not (folder / stages.CACHE).exists()
        assert [report["unit"] for report in reports] == list(dict.fromkeys(site["unit"] for site in record.sites))


def test_cifar10_runs(make: Make, tmp_path: Path, toy_model: Path) -> None:
    record = records.read(experiment.execute(make("cifar10_ddim", toy_model, (3, 8, 8), "method=rtn")))
    assert record.status == "ok" and record.expected_band == {}  # fewer images than the paper has


def test_weights_that_were_not_given_say_where_they_are(make: Make) -> None:
    with pytest.raises(EdadmError, match=r"imagenet_ldm4 needs weights: set model\.path .*cin256-v2"):
        make("imagenet_ldm4", "null", (3, 8, 8)).hash  # noqa: B018

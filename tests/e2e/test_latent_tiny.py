"""The embedded latent tasks from the command line to the record, at a small width with random weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from edadm import config, experiment, records
from edadm.metrics import clip_tiny
from edadm.sampling.noise import EVALUATION
from tests.tasks.narrow_latent import FOLDERS, autoencoder_folder

SMALL = (
    "method=edadm", "bits=w4a8", "profile.steps=2", "profile.images=3", "profile.rows=4", "profile.batch=2",
    "profile.iterations=2", "profile.range_batches=2", "chunk=2", "metrics.sqnr_rows=2", "metrics.bootstrap=10",
    "threads=1", "device=cpu", "reference=null",
)  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_task_runs_from_calibration_to_metrics(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("EDADM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(clip_tiny, "FOLDER", tmp_path / "clip")  # beside the text-to-image model
    folder, vae = FOLDERS[name](tmp_path / "model"), autoencoder_folder(tmp_path / "autoencoder") / "vae"
    prompted = name == "cifar10_t2i_tiny"
    metrics = ["is_tiny", "sqnr", "psnr", *(["clip_tiny"] if prompted else [])]
    words = [
        f"task={name}", f"model.path={folder}", f"model.first_stage={vae}", f"results={tmp_path / 'results'}",
        f"metrics.names=[{','.join(metrics)}]", *SMALL,
    ]  # fmt: skip
    run = experiment.prepare(config.settings(config.compose(words), words))
    assert run.guidance is not None and run.guidance.guides
    assert run.calibration_guidance is not None
    assert run.calibration_guidance.identity(EVALUATION) == run.guidance.identity(EVALUATION)
    record = records.read(experiment.execute(run))
    assert record.status == "ok" and record.variant["profile.rows"] == 4
    assert record.metrics["sqnr"]["value"] > 0 and record.metrics["is_tiny"]["value"] >= 1
    assert record.cost["macs"] > 0
    if prompted:
        score = record.metrics["clip_tiny"]
        assert 0 <= score["value"] <= 100 and score["proxy"] and "difference_to_fp" in score
        assert record.protocol["clip_tiny"].keys() == {"weights", "prompts"} and "clip" not in record.protocol
    layers = {n for n, m in run.task.denoiser().named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    quantized = {site["name"].rpartition(".")[0] for site in record.sites if site["kind"] == "weight"}
    assert layers == quantized

"""``task=pipeline`` from the command line to the record, on small pipelines of a user's own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import edadm
from edadm import config, experiment, records, requirements
from edadm.diagnostics.inputs import Inputs
from edadm.errors import EdadmError
from edadm.keys import Run
from edadm.quant.network import QuantModel
from tests.small_pipelines import PIPELINES, PROMPTS, TEXTS

SMALL = (
    "task=pipeline", "profile=demo", "profile.steps=3", "profile.rows=4", "profile.batch=2", "profile.iterations=2",
    "profile.range_batches=2", "n_images=3", "chunk=2", "metrics.names=[sqnr,psnr]", "metrics.sqnr_rows=2",
    "metrics.bootstrap=10", "threads=1", "device=cpu", "reference=null",
)  # fmt: skip
Words = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Without the messages of diffusers and transformers about what is not installed."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Words:
    """The command line of a small run of a pipeline, which it saves."""
    monkeypatch.setenv("EDADM_CACHE", str(tmp_path / "cache"))

    def line(name: str, *more: str) -> list[str]:
        if name in TEXTS:
            pytest.importorskip("transformers")
        folder = tmp_path / name
        if not folder.exists():
            PIPELINES[name](tmp_path / "vocabulary").save_pretrained(folder)
        (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
        text = [f"dataset.prompts={tmp_path / 'prompts.txt'}"] if name in TEXTS else []
        size = ["model.sample_shape=[4,8,8]"] if name == "flux" else []
        given = {word.split("=")[0] for word in more}
        small = [word for word in (*SMALL, *text) if word.split("=")[0] not in given]
        return [*small, *size, f"model.path={folder}", f"results={tmp_path / 'results'}", *more]

    return line


def settings(line: list[str]) -> config.Settings:
    return config.settings(config.compose(line), line)


def prepare(line: list[str]) -> Run:
    return experiment.prepare(settings(line))


def record_of(line: list[str]) -> records.Record:
    return records.read(experiment.execute(prepare(line), announce=True))


@pytest.mark.parametrize("name", ["ddim", "flux"])
def test_a_pipeline_runs_to_its_record(name: str, words: Words) -> None:
    record = record_of(words(name, "method=edadm"))
    assert (record.status, record.task, record.method) == ("ok", "pipeline", "edadm")
    assert record.metrics["sqnr"]["value"] > 0 and record.metrics["psnr"]["value"] > 0 and record.cost["macs"] > 0
    scheduler = {"ddim": "DDIMScheduler", "flux": None}[name]
    assert record.protocol["sampler"].get("scheduler") == scheduler
    assert record.config["calibration_sampler"]["name"] == "own"


def test_a_text_to_image_pipeline_runs_with_the_sampler_asked_for(words: Words) -> None:
    record = record_of(words("stable_diffusion", "method=rtn", "sampler=ddim_uniform", "sampler.guidance_scale=3"))
    assert record.status == "ok" and record.config["calibration_sampler"]["name"] == "own"
    sampler = record.protocol["sampler"]
    assert (sampler["part"], sampler["beta_end"], sampler["beta_schedule"]) == (
        "edadm.sampling.ddim.Sampler",
        0.012,
        "scaled_linear",
    )
    assert record.protocol["guidance"]["scale"] == 3


def test_a_saved_quantized_pipeline_is_scored_as_the_run_that_made_it(words: Words, tmp_path: Path) -> None:
    line = words("ddim", "method=rtn")
    made = record_of(line)
    cached = tmp_path / "cache" / "quantized" / made.artefacts["quantized"]
    edadm.load_pipeline(tmp_path / "ddim", quantized=cached).save_pretrained(tmp_path / "out")
    loaded = record_of([*line, f"load={tmp_path / 'out' / 'unet'}"])
    assert loaded.method == "rtn" and loaded.metrics["sqnr"]["value"] == made.metrics["sqnr"]["value"]
    assert loaded.metrics["psnr"]["value"] == made.metrics["psnr"]["value"]
    with pytest.raises(EdadmError, match="holds a UNet2DModel, the pipeline has a DiTTransformer2DModel"):
        prepare(words("dit", f"load={tmp_path / 'out' / 'unet'}"))


def test_sites_of_a_pipeline_are_listed(words: Words) -> None:
    table = experiment.sites_table(prepare(words("pixart")))
    assert "transformer_blocks.1.attn2.matmul.w" in table and "caption_projection.linear_1.weight_quantizer" in table


def test_diagnostics_call_the_networks_of_a_pipeline(words: Words) -> None:
    run = prepare(words("flux", "method=edadm"))
    inputs = Inputs(run, lambda *_: None)
    x, timestep, condition = inputs.calibration_rows.inputs()
    for network in (inputs.network_of_ranges(), inputs.quantized_network(), inputs.full_precision_network()):
        assert isinstance(network, QuantModel) and network(x, timestep=timestep, **condition)[0].shape == x.shape


@pytest.mark.parametrize(
    ("name", "word", "message"),
    [
        ("ddim", "sampler.guidance_scale=3", "unconditional"),
        ("stable_diffusion", "dataset.prompts=null", r"set dataset\.prompts"),
        ("stable_diffusion_3", "sampler=ddim_uniform", r"needs beta_schedule.* use sampler=own"),
        ("ddim", "sampler=flow_euler", "this model predicts epsilon"),
    ],
)
def test_what_does_not_fit_the_pipeline_is_named_first(name: str, word: str, message: str, words: Words) -> None:
    with pytest.raises(EdadmError, match=message):
        run = prepare(words(name, word))
        run.hash, run.sampler  # noqa: B018


def test_the_pipelines_sampler_is_for_pipelines(tmp_path: Path) -> None:
    line = ["task=cifar10_tiny", "sampler=own", f"results={tmp_path}"]
    with pytest.raises(EdadmError, match="that of a user's pipeline"):
        prepare(line)


def test_the_check_says_what_a_pipeline_needs(words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, complete = requirements.report(settings(words("stable_diffusion")))
    assert complete and "16 to evaluate, 1 others to calibrate" in text and "trajectories about" in text
    text, complete = requirements.report(settings(words("stable_diffusion", "dataset.prompts=null")))
    assert not complete and "Missing: prompts" in text
    assert "prompts" not in requirements.report(settings(words("dit")))[0]
    text, complete = requirements.report(settings(["task=pipeline", "device=cpu"]))
    assert not complete and "set model.path to the folder of a diffusers pipeline" in text
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    text, complete = requirements.report(settings(["task=pipeline", "model.path=some/body", "device=cpu"]))
    assert complete and f"{requirements.FETCHED}: some/body on the hub" in text and not (tmp_path / "hub").exists()

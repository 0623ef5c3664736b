from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edadm import config, experiment, records, stages, store
from edadm.calibration.rows import CalibrationSet
from edadm.errors import EdadmError
from edadm.keys import Run
from edadm.metrics.images import write_folder
from edadm.quant import io
from edadm.records import Record
from edadm.report.figures import STEP_CURVE

Toy = Callable[..., Run]


class Killed(BaseException):
    """What a kill looks like from inside."""


def execute(run: Run) -> Record:
    return records.read(experiment.execute(run))


def scores(record: Record) -> dict[str, Any]:
    return {name: result.get("value", result.get("values")) for name, result in record.metrics.items()}


def built(run: Run) -> dict[str, int]:
    """The number of finished artefacts of every stage."""
    counts: dict[str, int] = {}
    for artefact in run.store.artefacts():
        counts[artefact.stage] = counts.get(artefact.stage, 0) + artefact.complete
    return counts


def test_a_run_ends_in_a_record_that_says_what_was_done(toy: Toy) -> None:
    run = toy("method=edadm", "bits=w4a8")
    record = execute(run)
    assert (record.status, record.method, record.bits.name) == ("ok", "edadm", "w4a8")
    assert (record.calibration, record.reconstruction, record.optimization) == ("tdac", "fbr", "joint")
    assert set(record.stages) == {
        "trajectories",
        "calibration",
        "reconstruction",
        "sampling",
        "evaluation",
        "sqnr",
        "metrics",
    }
    assert all(stage.seconds is not None and stage.peak_memory_mib for stage in record.stages.values())
    assert len(record.metrics[STEP_CURVE]["values"]) == 4
    assert record.cost["bit_operations"] < record.cost["bit_operations_fp"]
    assert record.cost["size_mb"] < record.cost["size_fp_mb"]
    assert records.pictures(record, [run.results]) == [run.results / record.task / record.outputs["grid"]]
    assert all(store.Store().find(stage, run.key(stage)) is not None for stage in record.artefacts)


def test_every_site_is_in_the_record_with_its_bits(toy: Toy) -> None:
    record = execute(toy("method=rtn", "bits=w4a8"))
    bits = {site["name"]: site["bits"] for site in record.sites}
    assert bits["time_embedding.linear_1.weight_quantizer"] == 8
    assert bits["conv_in.weight_quantizer"] == 4
    assert (bits["conv_out.weight_quantizer"], bits["conv_out.act_quantizer"]) == (8, 32)
    assert "up_blocks.0.resnets.0.conv_shortcut.act_quantizer_0" in bits


def test_a_second_call_computes_nothing(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    first = experiment.execute(toy("method=rtn"))
    text = first.read_text()
    monkeypatch.setattr(stages, "stage", lambda *args, **kwargs: pytest.fail("a stage was looked at"))
    assert experiment.execute(toy("method=rtn")) == first
    assert first.read_text() == text


def test_a_lost_picture_is_drawn_again_from_cached_images(toy: Toy) -> None:
    run = toy("method=rtn")
    path = experiment.execute(run)
    picture = path.with_suffix(".png")
    drawn = picture.read_bytes()
    picture.unlink()
    assert experiment.execute(run) == path and picture.read_bytes() == drawn
    picture.unlink()
    shutil.rmtree(run.store.root / "images")
    assert experiment.execute(run) == path and not picture.exists()  # nor sampled again


def test_what_is_in_the_store_is_reused_without_its_record(toy: Toy) -> None:
    run = toy("method=rtn")
    path = experiment.execute(run)
    first = records.read(path)
    path.unlink()
    second = execute(run)
    assert all(stage.reused for stage in second.stages.values())
    assert {name: stage.seconds for name, stage in second.stages.items()} == {
        name: stage.seconds for name, stage in first.stages.items()
    }
    assert scores(second) == scores(first)


def test_methods_and_bits_share_trajectories_and_full_precision_images(toy: Toy) -> None:
    for words in (["method=rtn"], ["method=qdiffusion"], ["method=edadm"], ["method=rtn", "bits=w8a8"]):
        run = toy(*words)
        experiment.execute(run)
    counts = built(run)
    assert (counts["trajectories"], counts["evaluation"]) == (1, 1)
    assert counts["calibration"] == 3
    assert counts["quantized"] == 4
    assert counts["images"] == 5
    assert len([record for record in records.read_all([run.results]) if record.is_fp]) == 1


def test_the_seed_moves_calibration_but_not_the_noise_of_the_evaluation(toy: Toy) -> None:
    first, second = toy("method=rtn", "seed=0"), toy("method=rtn", "seed=1")
    for key in ("trajectories", "calibration", "quantized", "images"):
        assert first.hash_of(key) != second.hash_of(key)
    assert first.hash_of("evaluation") == second.hash_of("evaluation")
    assert experiment.full_precision(first).hash == experiment.full_precision(second).hash


def test_an_optimization_that_is_not_used_does_not_change_the_hash(toy: Toy) -> None:
    assert toy("method=rtn", "optimization=two_phase").hash == toy("method=rtn", "optimization=joint").hash
    assert toy("method=rtn", "recipe.lr_weight=1").key("quantized") == toy("method=rtn").key("quantized")
    assert toy("method=edadm", "recipe.lr_weight=1").hash != toy("method=edadm").hash


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("threads=2", "trajectories"), ("chunk=2", "images"), ("sampler.steps=5", "trajectories"),
        ("calibration=random", "calibration"), ("bits=w8a8", "quantized"), ("preset=paper", "quantized"),
        ("reconstruction=block", "quantized"), ("profile.range_batches=3", "quantized"), ("precision=bf16", "images"),
        ("n_images=5", "images"), ("evaluation_seed=7", "images"), ("metrics.bootstrap=10", "metrics"),
    ],
)  # fmt: skip
def test_what_changes_numbers_changes_the_hash(toy: Toy, word: str, key: str) -> None:
    plain = toy("method=edadm")
    try:
        assert toy("method=edadm", word).hash_of(key) != plain.hash_of(key)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("word", ["logger=wandb", "save_calibration_set=/tmp/x"])
def test_where_things_go_does_not_change_the_hash(toy: Toy, word: str) -> None:
    assert toy("method=edadm", word).hash == toy("method=edadm").hash


@pytest.mark.parametrize("method", ["edadm", "qdiffusion"])
@pytest.mark.parametrize("after", [1, 9])
def test_a_run_killed_between_units_ends_with_the_same_bits(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, after: int
) -> None:
    whole = execute(toy(f"method={method}"))
    monkeypatch.setenv("EDADM_CACHE", str(tmp_path / "other"))
    run = toy(f"method={method}", f"results={tmp_path / 'again'}")
    calls = 0

    def kill(path: Path, text: str) -> Path:
        nonlocal calls
        calls += path.name == stages.REPORTS
        if calls > after:
            raise Killed
        return store.write_atomically(path, text)

    monkeypatch.setattr(stages, "write_atomically", kill)
    with pytest.raises(Killed):
        experiment.execute(run)
    monkeypatch.setattr(stages, "write_atomically", store.write_atomically)
    resumed = execute(run)
    assert scores(resumed) == scores(whole)
    reports = json.loads((run.store.path("quantized", run.key("quantized")) / stages.REPORTS).read_text())
    assert len({(report["unit"], report["phase"]) for report in reports}) == len(reports)


def test_a_run_killed_between_chunks_samples_the_rest(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy("method=fp", "n_images=12")
    made: list[int] = []

    def stop(done: int) -> None:
        made.append(done)
        if len(made) == 2:
            raise Killed

    original = stages.generate_chunks
    monkeypatch.setattr(
        stages, "generate_chunks", lambda *a, **k: original(*a, **k | {"progress": lambda done, total: stop(done)})
    )
    with pytest.raises(Killed):
        stages.images(run, None)
    workspace = run.store.workspace("images", run.key("images"))
    finished = {path.name: path.stat().st_mtime_ns for path in (workspace / stages.CHUNKS).iterdir()}
    assert len(finished) == 2
    monkeypatch.setattr(stages, "generate_chunks", original)
    images = stages.read_images(stages.images(run, None))
    assert torch.equal(images[:6], stages.read_images(stages.images(toy("method=fp", "n_images=6"), None)))


def test_a_corrupted_artefact_is_computed_again_with_a_warning(
    toy: Toy, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = toy("method=rtn")
    path = experiment.execute(run)
    first = records.read(path)
    file = run.store.path("quantized", run.key("quantized")) / io.WEIGHTS
    broken = bytearray(file.read_bytes())
    broken[-1] ^= 1
    file.write_bytes(broken)
    path.unlink()
    monkeypatch.setattr(store, "_verified", set())
    with caplog.at_level(logging.WARNING):
        second = execute(run)
    assert "is broken" in caplog.text
    assert scores(second) == scores(first)
    assert not second.stages["ranges"].reused and second.stages["trajectories"].reused


def test_a_saved_model_is_scored_again_without_being_quantized(toy: Toy) -> None:
    run = toy("method=rtn", "bits=w3a8", "seed=5")
    first = execute(run)
    folder = run.store.path("quantized", run.key("quantized"))
    again = execute(toy(f"load={folder}"))
    assert (again.method, again.bits.name, again.seed) == ("rtn", "w3a8", 5)
    assert "reconstruction" not in again.stages and "ranges" not in again.stages
    assert scores(again) == scores(first)
    assert again.variant["load"] == str(folder)


def test_load_of_a_folder_without_a_model_says_what_is_missing(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(EdadmError, match=io.DESCRIPTION):
        toy(f"load={tmp_path}")


def test_saved_images_are_scored_without_a_network(toy: Toy, tmp_path: Path) -> None:
    write_folder(torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8), tmp_path / "pictures")
    record = execute(toy(f"images={tmp_path / 'pictures'}"))
    assert (record.method, record.n_images) == ("images", 5)
    assert record.metrics["psnr"]["reason"]


def test_an_image_folder_with_a_broken_file_names_it(toy: Toy, tmp_path: Path) -> None:
    write_folder(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), tmp_path / "pictures")
    (tmp_path / "pictures" / "000001.png").write_bytes(b"no image")
    with pytest.raises(EdadmError, match=r"000001\.png"):
        experiment.execute(toy(f"images={tmp_path / 'pictures'}"))


def test_a_calibration_set_is_saved_and_used_again(toy: Toy, tmp_path: Path) -> None:
    file = tmp_path / "rows.safetensors"
    first = execute(toy("method=edadm", f"save_calibration_set={file}"))
    rows, metadata = CalibrationSet.load(file)
    assert len(rows) == 8 and metadata["calibration"] == "tdac"
    run = toy("method=edadm", f"calibration_set={file}")
    again = execute(run)
    assert scores(again) == scores(first)
    assert "trajectories" not in again.stages


def test_a_calibration_set_with_too_few_rows_is_refused_before_anything_is_computed(toy: Toy, tmp_path: Path) -> None:
    file = tmp_path / "rows.safetensors"
    experiment.execute(toy("method=rtn", f"save_calibration_set={file}"))
    with pytest.raises(EdadmError, match="8 rows, 9 are needed"):
        toy("method=rtn", f"calibration_set={file}", "profile.rows=9")


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_images_give_reasons_not_numbers(toy: Toy, n: int) -> None:
    record = execute(toy("method=rtn", f"n_images={n}", "metrics.names=[psnr,ssim]"))
    assert record.n_images == n
    for result in record.metrics.values():
        assert (result["value"] is None) == bool(result["reason"])
        assert result["interval"] is None


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precision_is_recorded_and_compared_at_its_own_full_precision_row(toy: Toy, precision: str) -> None:
    run = toy("method=rtn", f"precision={precision}")
    record = execute(run)
    assert record.precision == precision
    assert experiment.full_precision(run).settings["precision"] == precision


@pytest.mark.parametrize("bits", ["w4a32", "w32a8", "w4a4"])
def test_weights_and_activations_are_quantized_independently(toy: Toy, bits: str) -> None:
    record = execute(toy("method=edadm", f"bits={bits}"))
    weight, act = int(bits[1 : bits.index("a")]), int(bits[bits.index("a") + 1 :])
    nominal = {site["kind"]: site["bits"] for site in record.sites if site["role"] == "resnet_conv1"}
    assert nominal == {"weight": weight, "act": act}


def test_preset_paper_and_published_scope_run(toy: Toy) -> None:
    assert execute(toy("method=edadm", "preset=paper")).preset == "paper"
    record = execute(toy("method=qdiffusion", "scope=published"))
    bits = {site["name"]: site["bits"] for site in record.sites}
    assert (bits["conv_out.weight_quantizer"], bits["conv_out.act_quantizer"]) == (4, 8)


def test_a_results_folder_that_cannot_be_written_is_refused(toy: Toy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdadmError, match="results="):
        toy("method=rtn", f"results={tmp_path / 'file' / 'results'}")


def test_a_gpu_that_is_not_there_is_named(toy: Toy) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EdadmError, match="device=cuda"):
        toy("method=rtn", "device=cuda")


def test_a_full_disk_while_sampling_loses_nothing_that_was_finished(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy("method=rtn")

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(stages, "generate_chunks", full)
    execute_fp = experiment.full_precision(run)
    with pytest.raises(EdadmError, match="disk is full"):
        stages.images(execute_fp, None)
    monkeypatch.undo()


def test_a_checkpoint_with_a_missing_key_is_named(toy: Toy, toy_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    name = "diffusion_pytorch_model.safetensors"
    state = load_file(toy_model / name)
    del state["conv_in.bias"]
    (tmp_path / "bad").mkdir()
    save_file(state, tmp_path / "bad" / name)
    (tmp_path / "bad" / "config.json").write_text((toy_model / "config.json").read_text())
    with pytest.raises(EdadmError, match=r"missing conv_in\.bias"):
        experiment.execute(toy("method=rtn", f"model.path={tmp_path / 'bad'}"))


def test_sites_are_listed_with_role_bits_and_unit(toy: Toy) -> None:
    text = experiment.sites_table(toy("method=rtn", "bits=w4a8"))
    head, *lines = text.splitlines()
    assert head.split() == ["name", "role", "kind", "bits", "unit"]
    assert any(line.split() == ["conv_in.weight_quantizer", "input", "weight", "4", "conv_in"] for line in lines)


def test_the_table_has_the_full_precision_row_first(toy: Toy, tmp_path: Path) -> None:
    paths = [experiment.execute(toy(f"method={method}")) for method in ("rtn", "edadm")]
    text = experiment.summary(paths, tmp_path / "steps.png")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert "too few for a verdict" in text
    assert rows[2].split()[1] == "FP" and {row.split()[1] for row in rows[3:]} == {"rtn", "edadm"}
    assert (tmp_path / "steps.png").is_file()


def test_a_failure_becomes_a_record_and_a_later_result_replaces_it(toy: Toy) -> None:
    run = toy("method=rtn")
    path = experiment.record_failure(run, "diverged", "unit conv_in, iteration 3: the loss is nan")
    assert records.read(path).status == "diverged"
    assert config.options("method")


def test_a_run_killed_while_its_artefact_is_sealed_samples_nothing_again(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = toy("method=fp")
    seal = store._seal

    def kill(work: Path, manifest: dict[str, Any]) -> None:
        raise Killed

    monkeypatch.setattr(store, "_seal", kill)
    with pytest.raises(Killed):
        stages.images(run, None)
    monkeypatch.setattr(store, "_seal", seal)
    monkeypatch.setattr(type(run.sampler), "run", None)  # sampling anything would fail
    result = stages.images(run, None)
    assert sorted(path.name for path in result.folder.iterdir()) == [stages.IMAGES, store.MANIFEST]


def test_a_run_killed_between_report_and_unit_reports_every_unit_once(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = toy("method=brecq")
    original, written = stages.atomic_file, 0

    @contextmanager
    def kill(path: Path) -> Iterator[Path]:
        nonlocal written
        written += path.parent.name == Path(stages.UNITS).name
        if written > 3:
            raise Killed
        with original(path) as temporary:
            yield temporary

    monkeypatch.setattr(stages, "atomic_file", kill)
    with pytest.raises(Killed):
        execute(run)
    monkeypatch.setattr(stages, "atomic_file", original)
    execute(run)
    reports = json.loads((run.store.path("quantized", run.key("quantized")) / stages.REPORTS).read_text())
    assert len({(report["unit"], report["phase"]) for report in reports}) == len(reports)


def test_calibration_rows_of_a_finished_run_are_saved_too(toy: Toy, tmp_path: Path) -> None:
    execute(toy("method=rtn"))
    target = tmp_path / "rows.safetensors"
    execute(toy("method=rtn", f"save_calibration_set={target}"))
    assert len(CalibrationSet.load(target)[0]) == 8


def test_rows_that_there_will_never_be_cannot_be_saved(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(EdadmError, match="nothing is calibrated"):
        toy("method=fp", f"save_calibration_set={tmp_path / 'rows.safetensors'}")
    (tmp_path / "file").write_text("")
    with pytest.raises(EdadmError, match=r"save_calibration_set=.* cannot be made"):
        toy("method=rtn", f"save_calibration_set={tmp_path / 'file' / 'rows.safetensors'}")


def test_threads_of_one_run_do_not_become_those_of_the_next(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "OWN_THREADS", 1)
    try:
        alone = toy("method=rtn", "threads=null")
        toy("method=rtn", "threads=2")
        after = toy("method=rtn", "threads=null")
        assert (alone.hash, alone.threads) == (after.hash, after.threads)
    finally:
        torch.set_num_threads(1)


def test_the_full_precision_row_follows_the_protocol_of_the_run(toy: Toy) -> None:
    run = toy("method=rtn", "profile=paper", "sampler.steps=4", "protocol.images=5")
    baseline = experiment.full_precision(run)
    assert baseline.settings["n_images"] == run.settings["n_images"]
    assert baseline.sampler == run.sampler


def test_steps_are_compared_chunk_by_chunk(toy: Toy) -> None:
    whole, parts = (toy("method=rtn", f"chunk={chunk}") for chunk in (4, 3))
    measured = []
    for run in (whole, parts):
        calibrated = stages.calibration(run, stages.trajectories(run))
        measured.append(stages.read_sqnr(stages.sqnr(run, stages.quantized(run, calibrated), stages.evaluation(run))))
    assert measured[0].error.shape == measured[1].error.shape == (4, 4)
    np.testing.assert_allclose(measured[0].signal, measured[1].signal, rtol=1e-3)


def test_a_loaded_model_is_known_by_what_is_read_of_it(toy: Toy) -> None:
    run = toy("method=rtn")
    folder = stages.quantized(run, stages.calibration(run, stages.trajectories(run))).folder
    before = toy(f"load={folder}").hash
    (folder / store.MANIFEST).write_text("{}")
    assert toy(f"load={folder}").hash == before

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from edadm import compare, experiment, records
from edadm.comparison import difference, draws_path, read_all_draws, read_draws, write_draws
from edadm.errors import EdadmError
from edadm.metrics import tiny
from edadm.records import Record
from edadm.report.table import tables
from edadm.store import Store
from tests.e2e.toy_task import prepare
from tests.metrics.small_clip import write_clip

METRICS = "metrics.names=[is_tiny,sqnr,psnr]"
REFERENCE = ("profile=reference", "profile.rows=8", "profile.batch=4", "profile.iterations=3")


@pytest.fixture(scope="module")
def finished(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``cache`` and ``results`` of two rows that were not resampled: the demo profile is not."""
    folder = tmp_path_factory.mktemp("finished")
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tiny.save_reference(tiny.build_reference(pictures, tiny.load_network(), "noise"), folder / "noise.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDADM_CACHE", str(folder / "cache"))
        for calibration in ("random", "uniform"):
            words = (f"calibration={calibration}", METRICS, f"metrics.reference={folder / 'noise.safetensors'}")
            experiment.execute(prepare(toy_model, folder / "results", "method=rtn", *words))
    return folder


@pytest.fixture
def results(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder of one's own with the finished runs, and a cache of one's own with their artefacts."""
    shutil.copytree(finished / "results", tmp_path / "results")
    shutil.copytree(finished / "cache", tmp_path / "cache")
    monkeypatch.setenv("EDADM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "results"


def runs(results: Path) -> dict[str, Record]:
    """The finished runs by what calibrated them."""
    return {"fp" if record.is_fp else record.calibration: record for record in records.read_all([results])}


def test_finished_runs_are_resampled_once(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = runs(results)
    assert read_all_draws([results]) == {}
    assert compare.complete(made.values(), results, Store()) == []
    draws = read_all_draws([results])
    assert draws.keys() == {record.hash for record in made.values()}
    assert set(draws[made["fp"].hash].metrics) == {"is_tiny"}
    found = draws[made["random"].hash].metrics
    for name in found:
        assert found[name].value == pytest.approx(made["random"].metrics[name]["value"], rel=1e-3), name
    assert (found["psnr"].n, found["sqnr"].n, len(found["is_tiny"].draws)) == (6, 4, 200)
    monkeypatch.setattr(compare, "resample", lambda *args: pytest.fail("resampled again"))
    assert compare.complete(made.values(), results, Store()) == []


def test_two_runs_differ_by_their_records_and_draws_alone(results: Path) -> None:
    made = runs(results)
    compare.complete(made.values(), results, Store())
    shutil.rmtree(Store().root)
    found = difference({0: made["random"]}, {0: made["uniform"]}, "psnr", read_all_draws([results]))
    assert found is not None
    a, b = (made[name].metrics["psnr"]["value"] for name in ("random", "uniform"))
    assert found.value == pytest.approx(a - b)
    low, high = found.interval
    assert low < found.value < high and found.n == 6


def test_a_profile_with_verdicts_is_resampled_at_the_end_of_its_runs(
    results: Path, toy_model: Path, finished: Path
) -> None:
    words = ("method=rtn", *REFERENCE, METRICS, f"metrics.reference={finished / 'noise.safetensors'}")
    path = experiment.execute(prepare(toy_model, results, *words))
    made = [record for record in records.read_all([results]) if record.profile == "reference"]
    assert {record.method for record in made} == {"rtn", "fp"}
    assert draws_path(path).is_file()
    [table] = tables(made, read_all_draws([results]))
    [contrast] = table.contrasts
    assert (contrast.to, [label for label, _ in contrast.rows]) == ("FP", ["rtn (profile.rows=8)"])
    assert table.missing == ()


@pytest.fixture
def scored_by_clip(results: Path, toy_model: Path, tmp_path: Path) -> tuple[Record, Path]:
    """A run that a profile with verdicts scored by a small CLIP, and its results folder."""
    write_clip(tmp_path / "small")
    (tmp_path / "prompts.txt").write_text("\n".join(f"number {i}" for i in range(6)), encoding="utf-8")
    words = (
        "method=rtn", *REFERENCE, "metrics=clip", "metrics.names=[clip,psnr]", "metrics.clip.pretrained=null",
        f"metrics.clip.prompts={tmp_path}/prompts.txt", f"metrics.clip.model=local-dir:{tmp_path}/small",
    )  # fmt: skip
    return records.read(experiment.execute(prepare(toy_model, results, *words))), results


def test_what_a_large_network_measured_is_resampled_from_what_the_run_kept(scored_by_clip: tuple[Record, Path]) -> None:
    record, results = scored_by_clip
    found = read_all_draws([results])[record.hash].metrics
    assert found.keys() == {"clip", "psnr"}
    assert found["clip"].value == pytest.approx(record.metrics["clip"]["value"]) and len(found["clip"].draws) == 200
    fp = next(made for made in records.read_all([results]) if made.is_fp and "clip" in made.metrics)
    contrast = difference({0: record}, {0: fp}, "clip", read_all_draws([results]))
    assert contrast is not None and contrast.value == pytest.approx(record.metrics["clip"]["difference_to_fp"]["value"])
    assert contrast.half_width > 0


def test_metrics_whose_features_are_gone_are_named_and_the_others_resampled(
    scored_by_clip: tuple[Record, Path],
) -> None:
    record, results = scored_by_clip
    shutil.rmtree(Store().root / "metrics" / record.artefacts["metrics"])
    assert compare.complete([record], results, Store()) == []  # they have draws
    draws_path(records.path_of(results, record.task, record.hash)).unlink()
    [line] = compare.complete([record], results, Store())
    assert ", clip: no features in the cache" in line and "psnr" not in line
    assert read_all_draws([results])[record.hash].metrics.keys() == {"psnr"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "resample", lambda *args: pytest.fail("resampled again"))
        assert compare.complete([record], results, Store()) == [line]


def test_draws_that_cannot_be_made_again_stay(scored_by_clip: tuple[Record, Path]) -> None:
    record, results = scored_by_clip
    shutil.rmtree(Store().root / "metrics" / record.artefacts["metrics"])
    path = draws_path(records.path_of(results, record.task, record.hash))
    before = read_draws(path)
    without = {name: found for name, found in before.metrics.items() if name != "psnr"}
    write_draws(dataclasses.replace(before, metrics=without), results)
    assert compare.complete([record], results, Store()) == []
    assert read_draws(path).metrics.keys() == before.metrics.keys()
    outdated = without | {"clip": dataclasses.replace(without["clip"], version=0)}
    write_draws(dataclasses.replace(before, metrics=outdated), results)
    compare.complete([record], results, Store())
    assert read_draws(path).metrics.keys() == {"psnr"}


def test_an_unknown_row_is_an_error_that_names_the_choices(results: Path) -> None:
    with pytest.raises(EdadmError, match="--to none_such: no such row; there are rtn"):
        compare.compare([results], Store(), "none_such")


def test_the_demo_keeps_no_features(results: Path) -> None:
    assert not list(Store().root.glob("metrics/*/kept.npz"))


def test_runs_without_their_images_are_named_with_a_way_out(results: Path) -> None:
    made, store = runs(results), Store()
    shutil.rmtree(store.root / "images" / made["random"].artefacts["images"])
    [line] = compare.complete([made["random"], made["uniform"]], results, store)
    assert line.startswith("rtn") and "has no images in the cache" in line and "results=FOLDER" in line
    assert read_all_draws([results]).keys() == {made["uniform"].hash}
    records.path_of(results, made["fp"].task, made["fp"].hash).unlink()
    [line] = compare.complete([made["random"]], results, store)
    assert "no record of the full-precision model" in line


def test_images_that_are_not_those_of_the_record_are_refused(results: Path) -> None:
    made = runs(results)
    metrics = made["random"].metrics | {"psnr": made["random"].metrics["psnr"] | {"value": 99.0}}
    [line] = compare.complete([dataclasses.replace(made["random"], metrics=metrics)], results, Store())
    assert "its record says 99" in line
    protocol = made["random"].protocol | {"tiny": {"features": "0" * 64, "reference": "0" * 64}}
    with pytest.raises(compare.NotResampled, match="another feature network"):
        compare.resample(dataclasses.replace(made["random"], protocol=protocol), made["fp"], Store())


def test_images_of_a_folder_and_failed_runs_are_left_alone(results: Path) -> None:
    run = runs(results)["random"]
    folder, failed = dataclasses.replace(run, method="images"), dataclasses.replace(run, status="failed", reason="x")
    assert compare.complete([folder, failed], results, Store()) == []
    assert read_all_draws([results]) == {}


def test_the_command_prints_what_was_skipped_and_compares_no_demo(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compare.main(["--results", str(results), "--to", "rtn (profile.rows=8)"]) == 0
    assert capsys.readouterr().out == ""
    shutil.rmtree(results / "cifar10_tiny" / "draws")
    shutil.rmtree(Store().root / "images")
    assert compare.main(["--results", str(results)]) == 0
    assert capsys.readouterr().out.count("- Not resampled: ") == 3
    monkeypatch.setattr(compare, "DEFAULT_RESULTS", (results, tmp_path / "empty", tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert compare.main([]) == 0  # a set without records among the usual ones is no error
    assert compare.main(["--results", str(results / "nothing")]) == 1
    assert "no records in" in capsys.readouterr().err

from __future__ import annotations

from dataclasses import replace

import pytest

from edadm.records import Record
from edadm.report.experiment_file import Row, load
from edadm.report.paper_rows import find_rows, standard_words
from edadm.report.published import changed_numbers, is_published
from tests.report.paper_records import made, run_of, scored
from tests.report.records_for_tests import metric

ABLATION = load("table6_ablation")


def test_the_standard_words_are_those_of_the_configuration() -> None:
    words = standard_words("cifar10_tiny")
    assert words == {
        "scope": "full", "preset": "released", "sampler": "ddim_quad", "precision": "fp32", "evaluation_seed": "1234",
    }  # fmt: skip


def test_records_go_to_their_row_by_seed() -> None:
    runs = [run_of(ABLATION.rows[1], seed) for seed in (0, 2)] + [run_of(ABLATION.rows[3])]
    rows, dropped = find_rows(ABLATION, runs)
    assert [sorted(found.runs) for found in rows] == [[], [0, 2], [], [0]]
    assert [found.missing_seeds for found in rows] == [[0, 1, 2], [1], [0, 1, 2], [1, 2]]
    assert not dropped


def test_a_method_whose_parts_are_spelled_out_is_the_method_itself() -> None:
    plain = made(["task=cifar10_ldm_tiny", "method=edadm", "bits=w4a8", "seed=1"])
    assert plain.variant == {}
    assert 1 in find_rows(ABLATION, [plain])[0][3].runs


@pytest.mark.parametrize(
    "word",
    [
        "profile=demo", "preset=paper", "scope=published", "precision=bf16", "n_images=500", "evaluation_seed=7",
        "sampler.steps=50", "sampler.eta=0.5", "sampler=ddim_uniform", "profile.rows=512", "profile.iterations=7",
        "calibration.weight=3", "recipe.lr_weight=0.1", "bits.act=6", "bits.softmax=6", "ranges=minmax",
        "profile.range_batches=2", "optimization=two_phase",
    ],
)  # fmt: skip
def test_a_run_that_differs_in_anything_else_is_no_run_of_the_row(word: str) -> None:
    other = made([*(f"{key}={value}" for key, value in ABLATION.rows[3].words.items()), word])
    assert not any(found.runs for found in find_rows(ABLATION, [other])[0])


def test_a_number_hidden_by_a_changed_part_is_seen() -> None:
    table = load("table7_calibration_reconstruction")
    row = next(row for row in table.rows if row.run.get("calibration") == "uniform")
    words = [f"{key}={value}" for key, value in row.words.items()]
    other = made([*words, "calibration.steps=10"])
    assert "calibration.steps" not in other.variant
    assert changed_numbers(other) == {"calibration.steps"}
    assert not any(found.runs for found in find_rows(table, [other])[0])


@pytest.mark.parametrize(
    "word",
    [
        "threads=1", "chunk=64", "metrics.bootstrap=10", "device=cpu", "sampler.steps=20", "model.path=elsewhere",
        "reconstruction.cache=host",
    ],
)  # fmt: skip
def test_where_and_how_a_run_was_made_does_not_matter(word: str) -> None:
    same = made([*(f"{key}={value}" for key, value in ABLATION.rows[3].words.items()), word])
    assert find_rows(ABLATION, [same])[0][3].runs


def test_the_weights_and_prompts_that_a_real_task_needs_change_no_number() -> None:
    table = load("table4_coco", "paper")
    row = next(row for row in table.rows if row.run["method"] == "edadm")
    words = [f"{key}={value}" for key, value in row.words.items()]
    own = made([*words, "model.path=/weights", "dataset.prompts=/captions.json"])
    rows, _ = find_rows(table, [own])
    assert [found.row.run for found in rows if found.runs] == [row.run]


@pytest.mark.parametrize(
    "word", ["task.calibration_conditions=released", "dataset.calibration_prompts=/more.txt"]
)  # fmt: skip
def test_a_run_calibrated_with_other_prompts_is_not_the_method_as_published(word: str) -> None:
    table = load("table4_coco", "paper")
    row = next(row for row in table.rows if row.run["method"] == "edadm")
    other = made([*(f"{key}={value}" for key, value in row.words.items()), word])
    assert not is_published(other) and not any(found.runs for found in find_rows(table, [other])[0])
    full_precision = next(row for row in table.rows if row.is_fp)
    same = made([*(f"{key}={value}" for key, value in full_precision.words.items()), word])
    assert any(found.runs for found in find_rows(table, [same])[0])


def test_drawbench_is_calibrated_with_prompts_that_the_user_brings() -> None:
    assert is_published(made(["task=drawbench_sd14", "method=edadm", "dataset.calibration_prompts=/more.txt"]))


def on_task_of(one: Row, row: Row) -> Row:
    return replace(row, words={**row.words, "task": one.words["task"]})


def test_rows_that_spell_out_the_defaults_share_their_records_with_those_that_do_not() -> None:
    grid = load("fig10_hyperparameters")
    at_default = next(row for row in grid.rows if row.point == {"tdac": 1.2, "fbr": 0.8})
    assert find_rows(ABLATION, [run_of(on_task_of(ABLATION.rows[3], at_default))])[0][3].runs
    without_fbr = run_of(on_task_of(at_default, ABLATION.rows[1]))
    assert any(found.runs for found in find_rows(grid, [without_fbr])[0])  # lambda of FBR 0


def test_a_changed_lambda_is_a_point_of_its_own() -> None:
    grid = load("fig10_hyperparameters")
    for row in grid.rows:
        rows = find_rows(grid, [run_of(row)])[0]
        assert [found.row.point for found in rows if found.runs] == [row.point]


def test_full_precision_belongs_to_every_number_of_rows_but_to_its_steps() -> None:
    table = load("table7_calibration_reconstruction")
    fp = made(["task=cifar10_tiny", "profile=reference", "method=fp", "sampler.steps=50", "profile.rows=1280"])
    found = [one.row.words["sampler.steps"] for one in find_rows(table, [fp])[0] if one.runs]
    assert found == ["50"]


def test_the_newest_record_of_a_seed_counts() -> None:
    old = run_of(ABLATION.rows[0], 0, scored(1.0))
    new = replace(run_of(ABLATION.rows[0], 0, scored(2.0)), hash="f" * 16, provenance={"date": "2027-01-01"})
    assert find_rows(ABLATION, [new, old])[0][0].runs[0] is new


def test_runs_measured_with_other_references_are_left_out() -> None:
    old = run_of(ABLATION.rows[0], protocol={"checkpoint": "old"})
    new = run_of(ABLATION.rows[1], provenance={"date": "2027-01-01"})
    rows, dropped = find_rows(ABLATION, [old, new])
    assert [bool(found.runs) for found in rows] == [False, True, False, False]
    assert dropped == [old]


def test_rows_may_differ_in_the_sampler() -> None:
    table = load("table9_samplers_steps")
    runs = [run_of(table.rows[3], protocol={"sampler": "a"}), run_of(table.rows[-1], protocol={"sampler": "b"})]
    rows, dropped = find_rows(table, runs)
    assert sum(bool(found.runs) for found in rows) == 2 and not dropped


def test_rows_may_differ_in_guidance_but_not_in_what_it_guides_to() -> None:
    table = load("table9_samplers_steps", "paper")
    guided = {"conditions": {"classes": 1000}, "channels": None}

    def run(place: int, **guidance: object) -> Record:
        made_with = {"checkpoint": "c", "sampler": str(place), "guidance": guided | guidance}
        return run_of(table.rows[place], protocol=made_with, provenance={"date": f"2027-01-0{1 + place % 9}"})

    strong, weak = run(3, scale=3.0), run(-1, scale=1.5)
    assert not find_rows(table, [strong, weak])[1]
    assert find_rows(table, [strong, run(-1, scale=1.5, conditions="others")])[1]


def test_runs_on_another_device_are_left_out() -> None:
    old = run_of(ABLATION.rows[0], provenance={"date": "2026-01-01", "device": "cpu"})
    new = run_of(ABLATION.rows[1], provenance={"date": "2027-01-01", "device": "cuda:0"})
    assert find_rows(ABLATION, [old, new])[1] == [old]


def test_a_failed_run_is_kept_apart() -> None:
    failed = run_of(ABLATION.rows[0], status="diverged", reason="loss is nan")
    (found, *_) = find_rows(ABLATION, [failed])[0]
    assert (dict(found.runs), found.failed, found.missing_seeds) == ({}, (failed,), [1, 2])


def test_seeds_that_diverged_beside_others_are_kept_apart_and_need_no_run() -> None:
    runs = [run_of(ABLATION.rows[0], seed) for seed in (0, 1)]
    lost = run_of(ABLATION.rows[0], 2, status="diverged", reason="loss is nan")
    (found, *_) = find_rows(ABLATION, [*runs, lost])[0]
    assert (sorted(found.runs), found.failed, found.missing_seeds) == ([0, 1], (lost,), [])
    assert found.lost == "1 seed diverged"


def test_results_of_an_older_version_of_a_metric_are_left_out() -> None:
    old, new = (run_of(ABLATION.rows[0], v, {"fd_tiny": metric(1.0, version=1 + v)}) for v in (0, 1))
    (found, *_) = find_rows(ABLATION, [old, new])[0]
    assert [list(found.runs[seed].metrics) for seed in (0, 1)] == [[], ["fd_tiny"]]
    assert found.older == {("fd_tiny", old.hash)}


def test_a_part_that_is_not_there_is_named() -> None:
    assert all(found.absent[-1] == "deployment int8" for found in find_rows(load("table11_deployment"), [])[0])
    assert not any(found.absent for found in find_rows(ABLATION, [])[0])

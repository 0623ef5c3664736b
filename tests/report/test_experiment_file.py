from __future__ import annotations

from pathlib import Path

import pytest

from edadm.errors import EdadmError
from edadm.report.experiment_file import load, missing_parts, names, same, source_of


def test_tables_come_before_figures_by_number_and_others_last() -> None:
    found = names()
    assert len(found) == 22
    assert found[:2] == ["table1_cifar10", "table2_lsun"] and found[10] == "table11_deployment"
    assert found[11] == "fig3_activation_range" and found[19] == "fig12_13_deployment"
    assert found[20:] == ["soft_rounding", "step_error"]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("table6_ablation", "Table VI"),
        ("table9_x", "Table IX"),
        ("fig10_h", "Figure 10"),
        ("fig12_13_d", "Figures 12 and 13"),
        ("step_error", "Beyond the paper"),
    ],
)
def test_an_experiment_knows_what_the_paper_calls_it(name: str, source: str) -> None:
    assert source_of(name) == source


def test_an_unknown_experiment_lists_the_choices() -> None:
    with pytest.raises(EdadmError, match=r"no experiment 'table99'.*table6_ablation"):
        load("table99")


def test_without_a_checkout_the_message_says_where_experiments_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDADM_ROOT", str(tmp_path))
    with pytest.raises(EdadmError, match="they belong to the checkout"):
        load("table6_ablation")


def test_an_unknown_scale_names_both() -> None:
    with pytest.raises(EdadmError, match="choose tiny or paper"):
        load("table6_ablation", "huge")


def test_a_row_has_the_words_of_its_block_its_scale_and_its_own() -> None:
    row = load("table6_ablation").rows[1]
    assert row.run == {"method": "edadm", "bits": "w4a8", "calibration": "tdac", "reconstruction": "block"}
    assert row.words == {"task": "cifar10_ldm_tiny", "profile": "reference"} | row.run
    assert (row.paper, row.seeds) == ({"method": "+TDAC"}, (0, 1, 2))
    paper = load("table6_ablation", "paper").rows[1]
    assert (paper.words["task"], paper.words["profile"], paper.run) == ("imagenet_ldm4", "paper", row.run)


def test_a_block_may_be_of_one_scale_and_have_its_own_seeds() -> None:
    tiny, paper = (load("table7_calibration_reconstruction", scale) for scale in ("tiny", "paper"))
    assert {row.run["sampler.steps"] for row in tiny.rows} == {"20", "50"}
    assert {row.run["sampler.steps"] for row in paper.rows} == {"100"}
    seeds = {row.run.get("profile.rows"): row.seeds for row in tiny.rows if not row.is_fp}
    assert seeds == {"256": (0, 1, 2), "1280": (0,)}


def test_a_job_is_asked_for_by_the_row_with_all_its_words() -> None:
    experiment = load("table7_calibration_reconstruction")
    shared = ["method=edadm", "bits=w4a8", "sampler.steps=20", "reconstruction=block"]
    assert experiment.asks_for([*shared, "profile.rows=256", "calibration=uniform", "seed=2"])
    assert not experiment.asks_for([*shared, "profile.rows=1280", "calibration=uniform", "seed=2"])  # one seed only
    assert experiment.asks_for([*shared, "profile.rows=1280", "calibration=uniform", "seed=7"])  # the user's own seed
    assert not experiment.asks_for([*shared, "calibration=uniform", "seed=0"])  # an axis is missing
    assert not experiment.asks_for(
        [*shared[:3], "profile.rows=256", "calibration=random", "reconstruction=fbr", "seed=0"]
    )


def test_a_profile_of_the_users_own_is_no_reason_to_drop_a_job() -> None:
    words = ["method=edadm", "bits=w4a8", "calibration=tdac", "reconstruction=block", "profile=demo", "seed=0"]
    assert load("table6_ablation").asks_for(words)


@pytest.mark.parametrize(("one", "other", "equal"), [("1.20", "1.2", True), ("0", "0.0", True), ("a", "b", False)])
def test_numbers_are_equal_however_they_are_written(one: str, other: str, equal: bool) -> None:
    assert same(one, other) is equal


def test_the_command_of_a_row_names_what_tells_it_apart() -> None:
    experiment = load("table6_ablation")
    command = "python run.py -m experiments=table6_ablation calibration=tdac reconstruction=block"
    assert experiment.command(experiment.rows[1]) == command
    assert experiment.command(experiment.rows[1], (1, 2)) == f"{command} seed=1,2"
    paper = load("table6_ablation", "paper")
    assert paper.command(paper.rows[1]).startswith(
        "python run.py -m experiments=table6_ablation scale=paper calibration=tdac"
    )


def test_the_command_of_full_precision_is_a_run_of_its_own() -> None:
    experiment = load("table1_cifar10")
    assert experiment.rows[0].is_fp
    assert experiment.command(experiment.rows[0]) == "python run.py task=cifar10_tiny profile=reference method=fp"


def test_effects_are_taken_against_the_row_of_the_same_printed_table() -> None:
    experiment = load("table2_lsun")  # both printed tables have one embedded counterpart
    church = next(
        row for row in experiment.rows if row.paper == {"task": "LSUN-Church", "method": "PTQD", "bits": "W4A8"}
    )
    reference = experiment.reference_of(church)
    assert reference is not None
    assert reference.paper == {"task": "LSUN-Church", "method": "EDA-DM", "bits": "W4A8"}


def test_full_precision_has_no_effect() -> None:
    experiment = load("table1_cifar10")
    assert experiment.reference_of(experiment.rows[0]) is None


def test_a_part_is_missing_until_its_file_is_there(tmp_path: Path) -> None:
    (tmp_path / "conf" / "method").mkdir(parents=True)
    words = {"method": "ptqd", "deployment": "int8", "profile.rows": "256", "seed": "0"}
    assert missing_parts(words, tmp_path) == ["method ptqd", "deployment int8"]
    (tmp_path / "conf" / "method" / "ptqd.yaml").touch()
    assert missing_parts(words, tmp_path) == ["deployment int8"]

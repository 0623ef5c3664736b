from __future__ import annotations

import math

import pytest

from edadm.records import Record, Stage
from edadm.report import frame
from edadm.report.render import markdown
from edadm.report.table import Cell, Row, Table, tables
from tests.report.records_for_tests import fp, metric, record, resampled


def one(records: list[Record]) -> Table:
    [table] = tables(records)
    return table


def row(table: Table, label: str) -> Row:
    [found] = [row for row in table.rows if row.label == label]
    return found


def cell(table: Table, label: str, metric_name: str) -> Cell:
    index = [column.name for column in table.columns].index(metric_name)
    return row(table, label).cells[index]


def seeds(method: str, values: list[float], **fields: object) -> list[Record]:
    return [record(method, seed, fd=value, **fields) for seed, value in enumerate(values)]


def test_mean_and_deviation_over_seeds_by_hand() -> None:
    table = one([fp(), *seeds("edadm", [10.0, 12.0, 14.0])])
    found = cell(table, "edadm", "fd_tiny")
    assert (found.mean, found.std) == (12.0, 2.0)
    assert row(table, "edadm").seeds == (0, 1, 2)
    assert row(table, "edadm").seconds == pytest.approx(66.0)
    assert row(table, "edadm").peak_mib == 900.0


def test_seconds_measured_beside_other_work_are_marked() -> None:
    busy = {"calibration": Stage(2.0, 10.0, other_load=0.0), "reconstruction": Stage(2.0, 10.0, other_load=2.4)}
    table = one([fp(), record(stages=busy), record("rtn", stages={"calibration": Stage(2.0, 10.0, other_load=0.1)})])
    assert row(table, "edadm").other_load == 1.2
    text = markdown([table])
    assert "4.0 (busy)" in text and "2.0 (busy)" not in text
    assert "edadm: its seconds are no measure of cost: other work kept up to 1.2 cores busy meanwhile." in text
    assert "rtn: its seconds" not in text


def test_a_single_seed_has_an_interval_but_no_deviation() -> None:
    table = one([fp(), record(metrics={"ssim": metric(0.5, True, interval=[0.4, 0.6])})])
    found = cell(table, "edadm", "ssim")
    assert (found.mean, found.std, found.interval) == (0.5, None, (0.4, 0.6))


def test_groups_share_task_bits_scope_preset_profile_n_and_protocol() -> None:
    base = {"fd": 1.0}
    records = [
        record(**base),
        record(**base, bits="w8a8"),
        record(**base, scope="published"),
        record(**base, preset="paper", config={"preset": "paper"}),
        record(**base, profile="demo"),
        record(**base, n_images=512),
        record(**base, task="other"),
        record(**base, protocol={"steps": 50}, config={"steps": 50}),
        record(**base, precision="bf16", config={"precision": "bf16"}),
    ]
    found = tables(records)
    assert len(found) == len(records)
    assert all(len([row for row in table.rows if row.hashes]) == 1 for table in found)


def test_full_precision_is_first_in_every_table_of_its_protocol() -> None:
    found = tables([record(), record(bits="w8a8"), fp(), record(n_images=512)])
    assert [table.rows[0].label for table in found] == ["FP", "FP", "FP"]
    with_fp = [bool(table.rows[0].hashes) for table in found]
    assert with_fp == [table.facts["n_images"] == 2048 for table in found]


def test_full_precision_alone_is_a_table() -> None:
    table = one([fp(5.0)])
    assert table.heading == "toy, full precision, n=2048"
    assert cell(table, "FP", "fd_tiny").mean == 5.0


@pytest.mark.parametrize(("value", "off"), [(5.0, False), (7.5, True), (3.9, True)])
def test_full_precision_outside_of_the_expected_band_is_flagged(value: float, off: bool) -> None:
    table = one([fp(value, expected_band={"fd_tiny": [4.0, 6.0]}), record()])
    assert cell(table, "FP", "fd_tiny").off_band is off
    assert any("outside of [4, 6]" in note for note in table.notes) is off


def bold(records: list[Record], spread: float = 0.1) -> set[tuple[str, str]]:
    [table] = tables(records, resampled(records, spread))
    return {(row.label, column.name) for row in table.rows for column, c in zip(table.columns, row.cells) if c.best}


def test_the_best_follows_the_direction_of_the_metric() -> None:
    records = [fp(0.1), *seeds("edadm", [10.0, 10.1, 10.2], sqnr=18.0), *seeds("rtn", [30.0, 30.1, 30.2], sqnr=25.0)]
    assert bold(records) == {("edadm", "fd_tiny"), ("rtn", "sqnr")}


def test_nothing_is_bold_that_is_not_told_from_every_other_row() -> None:
    edadm, rtn = seeds("edadm", [10.0, 11.0, 12.0]), seeds("rtn", [40.0, 41.0, 42.0])
    assert bold([*edadm, *rtn]) == {("edadm", "fd_tiny")}
    brecq = seeds("brecq", [10.5, 11.0, 12.5])
    assert bold([*edadm, *rtn, *brecq]) == set()


def test_noise_of_the_images_alone_can_hide_the_best() -> None:
    records = [*seeds("edadm", [10.0, 10.0, 10.0]), *seeds("rtn", [11.0, 11.0, 11.0])]
    assert bold(records, spread=0.1) == {("edadm", "fd_tiny")}
    assert bold(records, spread=5.0) == set()


def test_two_seeds_or_missing_draws_make_nothing_bold() -> None:
    few = [*seeds("edadm", [10.0, 10.0]), *seeds("rtn", [30.0, 30.0])]
    assert bold(few) == set()
    many = [*seeds("edadm", [10.0] * 3), *seeds("rtn", [30.0] * 3)]
    [table] = tables(many, resampled(many[:-1]))
    assert not any(c.best for r in table.rows for c in r.cells)
    assert "paired differences of rtn" in {gap.what for gap in table.missing}


def test_no_winner_without_a_rival_or_a_direction() -> None:
    assert bold([fp(), *seeds("edadm", [10.0] * 3)]) == set()
    plain = [
        record(method, seed, metrics={"x": {"value": value, "n": 4}})
        for method, value in (("edadm", 1.0), ("rtn", 9.0))
        for seed in range(3)
    ]
    assert bold(plain) == set()


def test_rows_are_compared_with_edadm_and_full_precision() -> None:
    records = [fp(5.0), *seeds("edadm", [10.0, 11.0, 12.0]), *seeds("rtn", [13.0, 15.0, 14.0])]
    [table] = tables(records, resampled(records))
    to_edadm, to_fp = table.contrasts
    assert (to_edadm.to, [label for label, _ in to_edadm.rows]) == ("edadm", ["rtn"])
    assert (to_fp.to, [label for label, _ in to_fp.rows]) == ("FP", ["edadm", "rtn"])
    fd_tiny, sqnr = dict(to_fp.rows)["edadm"]
    assert fd_tiny.value == pytest.approx(6.0) and fd_tiny.seed_deviation == pytest.approx(1.0)
    assert sqnr is None  # full precision is not compared with itself
    assert dict(to_edadm.rows)["rtn"][0].value == pytest.approx(3.0)  # of 3, 4 and 2


def test_another_row_can_be_the_reference() -> None:
    records = [*seeds("edadm", [10.0]), *seeds("rtn", [13.0])]
    [table] = tables(records, resampled(records), "rtn")
    [contrast] = table.contrasts
    assert (contrast.to, dict(contrast.rows)["edadm"][0].value) == ("rtn", pytest.approx(-3.0))


def test_without_draws_the_table_says_how_to_make_them() -> None:
    records = [fp(), *seeds("edadm", [10.0])]
    [table] = tables(records)
    assert table.contrasts == ()
    assert {gap.what: gap.command for gap in table.missing} == {
        "paired differences of FP, edadm": "python -m edadm.compare"
    }
    [table] = tables([fp(fd=None), *seeds("edadm", [10.0])])  # nothing of FP can be resampled
    assert [gap.what for gap in table.missing] == ["paired differences of edadm"]


def test_the_demo_is_headed_as_no_verdict_and_marks_no_winner() -> None:
    demo = {"profile": "demo", "n_images": 256}
    records = [fp(**demo), *seeds("edadm", [10.0] * 3, **demo), *seeds("rtn", [50.0] * 3, **demo)]
    [table] = tables(records, resampled(records))
    assert table.heading == "demo profile, n=256: too few for a verdict"
    assert not any(c.best for r in table.rows for c in r.cells)
    assert table.contrasts == () and table.missing == ()
    assert not any("Bold" in note for note in table.notes)


def test_small_n_is_not_comparable_with_published_numbers() -> None:
    few, many = one([record(n_images=4999)]), one([record(n_images=5000)])
    assert any("not comparable with published FID" in note for note in few.notes)
    assert not any("not comparable" in note for note in many.notes)


def test_variants_are_rows_of_their_own() -> None:
    random = record(variant={"calibration": "random"}, config={"calibration": "random"})
    both = record(variant={"reconstruction": "block", "calibration": "random"}, config={"reconstruction": "block"})
    table = one([fp(), record(), random, both])
    assert [row.label for row in table.rows[1:]] == [
        "edadm",
        "edadm (calibration=random)",
        "edadm (calibration=random, reconstruction=block)",
    ]


def test_runs_with_other_numbers_are_never_averaged() -> None:
    slow = record(config={"optimization": {"iterations": 200}}, seed=1)
    fast = record(config={"optimization": {"iterations": 100}})
    table = one([fp(), slow, fast])
    assert {row.label for row in table.rows[1:]} == {
        "edadm [optimization.iterations=100]",
        "edadm [optimization.iterations=200]",
    }


def test_seed_and_places_do_not_split_a_row() -> None:
    configs = [{"noise": {"seed": seed}, "results": f"r{seed}", "device": "cpu"} for seed in range(2)]
    table = one([record(seed=seed, config=configs[seed]) for seed in range(2)])
    assert row(table, "edadm").seeds == (0, 1)


def test_the_places_of_equal_files_do_not_split_a_row() -> None:
    places = [
        {"model": {"path": place}, "task": {"path": place}, "metrics": {"inception": {"weights": place}}}
        for place in ("/data/a", "/scratch/b")
    ]
    records = [record(seed=seed, config=config) for seed, config in enumerate(places)]
    assert row(one([fp(), *records]), "edadm").seeds == (0, 1)


def test_runs_on_a_cpu_and_on_a_gpu_share_no_table() -> None:
    devices = [record(provenance={"device": device}, config={"x": device}) for device in ("cpu", "cuda", "cuda:1")]
    found = tables([*devices, fp(provenance={"device": "cuda"})])
    assert [(table.facts["device"], bool(table.rows[0].hashes)) for table in found] == [("cpu", False), ("cuda", True)]
    assert "; device cuda" in markdown(found[1:])


def test_results_of_an_older_version_of_a_metric_are_left_out() -> None:
    values = {0: (1.0, 1), 1: (5.0, 2), 2: (7.0, 2)}
    records = [record(seed=seed, metrics={"x": metric(v, version=version)}) for seed, (v, version) in values.items()]
    table = one([*records, fp(metrics={"x": metric(4.0, version=2)})])
    assert cell(table, "edadm", "x").mean == 6.0
    assert "x: 1 result of an older version of the metric left out." in table.notes
    assert any(gap.what == "edadm, seed 0: x" for gap in table.missing)


def test_tables_of_other_samplers_have_other_headings() -> None:
    def sampled(**protocol: object) -> Record:
        return record(protocol={"sampler": protocol.pop("sampler", "ddim"), "steps": 20} | protocol, config=protocol)

    headings = [
        table.heading for table in tables([sampled(), sampled(sampler="plms"), sampled(guidance={"scale": 3.0})])
    ]
    shared = "toy, W4A8, scope full, preset released, profile reference, n=2048"
    assert sorted(headings) == [
        f"{shared}, {end}" for end in ("ddim, guidance 3.0", "ddim, no guidance", "plms, no guidance")
    ]


def test_of_two_records_of_a_seed_the_newest_counts() -> None:
    old = record(fd=1.0, hash="0" * 16, provenance={"date": "2026-01-01"})
    new = record(fd=2.0, hash="1" * 16, provenance={"date": "2026-02-01"})
    table = one([new, old])
    assert cell(table, "edadm", "fd_tiny").mean == 2.0
    assert any("left out: 00000000" in note for note in table.notes)


def test_failures_are_shown_with_their_reason() -> None:
    records = [
        *seeds("edadm", [10.0, 11.0]),
        record("edadm", 2, status="diverged", reason="NaN in unit mid at 40", metrics={}),
        record("rtn", status="failed", reason="out of memory", metrics={}),
    ]
    table = one([fp(), *records])
    assert cell(table, "rtn", "fd_tiny").text == "failed"
    assert (row(table, "edadm").seeds, row(table, "edadm").tried) == ((0, 1), 3)
    assert "edadm, seed 2: diverged: NaN in unit mid at 40" in table.notes
    assert "rtn, seed 0: failed: out of memory" in table.notes


def test_a_metric_without_a_value_says_why() -> None:
    table = one([fp(), record(metrics={"fd_tiny": metric(None, reason="one image: distances need more")})])
    assert cell(table, "edadm", "fd_tiny").text == "n/a"
    assert any("one image" in note for note in table.notes)


def test_a_metric_that_no_run_has_leaves_its_reason_and_no_column() -> None:
    none = {"fd_tiny_infinity": metric(None, reason="at least 258 images")}
    table = one([fp(metrics={"fd_tiny": metric(5.0)} | none), record(metrics={"fd_tiny": metric(9.0)} | none)])
    assert [column.name for column in table.columns] == ["fd_tiny"]
    assert "fd_tiny_infinity is n/a: at least 258 images" in table.notes


def test_paired_metrics_of_full_precision_are_a_dash() -> None:
    paired = metric(None, True, reason="no images to compare with", kind="paired")
    table = one([fp(metrics={"ssim": paired}), record(metrics={"ssim": metric(0.9, True, kind="paired")})])
    assert cell(table, "FP", "ssim").text == "–"
    assert not any("to compare" in note for note in table.notes)


def test_infinite_values_have_a_mean_and_no_deviation() -> None:
    table = one([record(seed=seed, sqnr=math.inf) for seed in range(2)])
    assert cell(table, "edadm", "sqnr").mean == math.inf
    assert cell(table, "edadm", "sqnr").std is None


def test_differences_to_full_precision_are_noted() -> None:
    difference = {"value": 5.0, "interval": [4.5, 5.5]}
    table = one([fp(), record(metrics={"fd_tiny": metric(10.0, difference_to_fp=difference)})])
    assert any("fd_tiny minus that of FP" in note and "edadm +5 [+4.5, +5.5]" in note for note in table.notes)


def commands(records: list[Record]) -> dict[str, str]:
    return {gap.what: gap.command for table in tables(records, resampled(records)) for gap in table.missing}


def test_a_missing_full_precision_row_names_its_command() -> None:
    gap = {"the full-precision row": "python run.py task=toy profile=reference method=fp"}
    assert commands([record(variant={"calibration": "random"})]) == gap


def test_missing_seeds_and_bits_name_their_commands() -> None:
    records = [fp(), record(), record(seed=1), record("rtn"), record(bits="w8a8"), record(seed=1, bits="w8a8")]
    assert commands(records) == {
        "rtn, seed 1": "python run.py task=toy method=rtn profile=reference bits=w4a8 seed=1",
        "rtn, seeds 0, 1": "python run.py -m task=toy method=rtn profile=reference bits=w8a8 seed=0,1",
    }


def test_a_missing_metric_names_its_command() -> None:
    records = [fp(), record(), record("rtn", metrics={"fd_tiny": metric(30.0)})]
    assert commands(records) == {
        "rtn, seed 0: sqnr": "python run.py task=toy method=rtn bits=w4a8 profile=reference seed=0"
    }


def test_commands_follow_from_the_fields_where_no_overrides_are_recorded() -> None:
    records = [fp(), record(), record("rtn", seed=1, overrides=[])]
    expected = "python run.py task=toy method=rtn scope=full preset=released profile=reference bits=w4a8 seed=0"
    assert commands(records)["rtn, seed 0"] == expected


def test_columns_say_their_n_where_it_is_not_that_of_the_images() -> None:
    table = one([record(metrics={"sqnr": metric(20.0, True, n=64), "fd_tiny": metric(9.0)})])
    assert [column.n for column in table.columns] == [64, 2048]


def test_the_order_of_the_records_does_not_matter() -> None:
    records = [fp(), *seeds("edadm", [10.0, 11.0]), *seeds("rtn", [30.0, 31.0]), record(bits="w8a8")]
    assert tables(records) == tables(records[::-1])


def test_frame_has_a_line_for_each_scalar_metric() -> None:
    curve = {"sqnr_per_step": {"values": [1.0, 2.0], "n": 4}}
    found = frame([fp(), record(metrics={"fd_tiny": metric(10.0)} | curve)])
    assert list(found[["method", "metric", "value"]].itertuples(index=False, name=None))[-1] == (
        "edadm",
        "fd_tiny",
        10.0,
    )
    assert "sqnr_per_step" not in set(found["metric"])

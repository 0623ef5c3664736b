from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from edadm import config
from edadm.errors import EdadmError
from edadm.records import Record
from edadm.report.claims import NO_WORSE, Claim, absent_parts, commands, experiment_command, fits, load, sides
from tests.conftest import ROOT
from tests.report.paper_records import made
from tests.report.records_for_tests import fp, record

CLAIMS = load().claims
METHODS = {
    "fp": "FP", "edadm": "EDA-DM", "qdiffusion": "Q-Diffusion", "ptq4dm": "PTQ4DM", "tfmq": "TFMQ-DM", "ptqd": "PTQD",
    "tac": "TAC-Diffusion", "tcaq": "TCAQ-DM",
}  # fmt: skip
COMPONENTS = {
    ("random", "block"): "baseline", ("tdac", "block"): "+TDAC", ("random", "fbr"): "+FBR",
    ("tdac", "fbr"): "+TDAC+FBR",
}  # fmt: skip
SAMPLERS = {"normal": "NDTC", "uniform": "TSC", "tss": "TSS", "tdac": "TDAC (ours)"}
RECONSTRUCTIONS = {"layer": "Layer-wise", "tiar": "TIAR", "fbr": "FBR (ours)"}


def printed(claim: Claim, side: Mapping[str, Any]) -> list[float]:
    """The numbers that the paper prints for a side of a claim."""
    table, label = claim.source.removeprefix("Table "), METHODS[side["method"]]
    if table == "VI":
        label = COMPONENTS[side["calibration"], side["reconstruction"]]
    if table == "VII":
        label = RECONSTRUCTIONS.get(side["reconstruction"]) or SAMPLERS[side["calibration"]]
    with open(ROOT / "results" / "paper" / f"table-{table}.csv", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["method"] == label]
    lines = [line for line in lines if line["metric"].lower() == claim.metric.lower()]
    bits = str(side.get("bits", "")).upper()
    lines = [line for line in lines if label == "FP" or not line["bits"] or line["bits"].startswith(bits)]
    if "rows" in side:
        lines = [line for line in lines if line["task"].endswith(f"={side['rows']}")]
    if table == "II":
        place = "LSUN-Bedroom" if "lsun_bedroom_ldm4" in claim.tasks else "LSUN-Church"
        lines = [line for line in lines if line["task"].startswith(place)]
    if table == "V":
        lines = [line for line in lines if line["task"] == "DrawBench"]
    return [float(line["value"]) for line in lines]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.id)
def test_every_claim_is_what_the_paper_prints(claim: Claim) -> None:
    pairs = list(zip(printed(claim, claim.first), printed(claim, claim.second), strict=True))
    assert pairs
    for first, second in pairs:
        better = second - first if claim.metric in ("FID", "sFID") else first - second
        assert better > 0 or (claim.relation == NO_WORSE and better >= -claim.margin * second)


def claim(first: dict[str, Any], second: dict[str, Any], **fields: Any) -> Claim:
    given = {"id": "x", "source": "Table I", "statement": "a is better", "metric": "FID", "metrics": ("fd_tiny",)}
    return Claim(**(given | {"tasks": {"toy": {1024: 256}}, "first": first, "second": second} | fields))


def ablation(method: str = "edadm", seed: int = 0, rows: int = 256, own_rows: int = 256, **parts: str) -> Record:
    """A run with other parts than its method's, as ``config.variant`` tells them."""
    variant = parts | ({"profile.rows": rows} if rows != own_rows else {})
    return record(method, seed, variant=variant, config={"profile": {"rows": rows}} | parts, **parts)


@pytest.mark.parametrize(
    ("run", "side", "expected"),
    [
        (record(), {"method": "edadm"}, True),
        (record(), {"method": "rtn"}, False),
        (record(), {"method": "edadm", "bits": "w4a8"}, True),
        (record(), {"method": "edadm", "bits": "w8a8"}, False),
        (ablation(calibration="random"), {"method": "edadm"}, False),
        (ablation(calibration="random"), {"method": "edadm", "calibration": "random"}, True),
        (ablation(calibration="random"), {"method": "edadm", "calibration": "tdac"}, False),
        (record(calibration="tdac"), {"method": "edadm", "calibration": "tdac"}, True),
        (ablation(calibration="random", reconstruction="block"), {"method": "edadm", "calibration": "random"}, False),
        (record(variant={"recipe.lr_weight": 0.1}), {"method": "edadm"}, False),
        (ablation(), {"method": "edadm", "rows": 1024}, True),
        (ablation(rows=1280), {"method": "edadm", "rows": 5120}, True),
        (ablation(rows=1280), {"method": "edadm", "rows": 1024}, False),
        (ablation(rows=1280), {"method": "edadm"}, False),
        (ablation(rows=512), {"method": "edadm", "rows": 512}, True),
    ],
)
def test_a_record_fits_a_side_whose_parts_it_has_and_no_others(
    run: Record, side: dict[str, Any], expected: bool
) -> None:
    assert fits(run, side, {1024: 256, 5120: 1280}) is expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("scope.split=false", False), ("preset.mid_zero_point=true", False), ("profile.range_batches=1", False),
        (f"calibration_set={__file__}", False), ("bits.softmax=6", False), ("profile.images=500", True),
        ("sampler.steps=50", True), ("model.path=elsewhere", True), ("scope=published", True), ("preset=paper", True),
    ],
)  # fmt: skip
def test_only_runs_of_the_method_as_published_fit(word: str, expected: bool) -> None:
    assert fits(made(["method=edadm", word]), {"method": "edadm"}, {}) is expected


def test_the_paper_profile_has_the_printed_rows() -> None:
    run = record(profile="paper", config={"profile": {"rows": 1024}})
    assert fits(run, {"method": "edadm", "rows": 1024}, {1024: 256})


def test_sides_are_runs_of_one_group_by_seed() -> None:
    both = claim({"method": "edadm"}, {"method": "rtn"})
    records = [
        *(record(method, seed) for method in ("edadm", "rtn") for seed in range(2)),
        *(record(method, n_images=512) for method in ("edadm", "rtn")),
        record("edadm", task="other"),
        record("rtn", task="other"),
        record("edadm", preset="paper", config={"preset": "paper"}),
        *(record(method, profile="demo") for method in ("edadm", "rtn")),
    ]
    found = sides(both, records)
    assert sorted((len(first), len(second)) for first, second in found.values()) == [(1, 1), (2, 2)]
    first, second = max(found.values(), key=lambda pair: len(pair[0]))
    assert {run.method for run in first.values()} == {"edadm"} and set(second) == {0, 1}


def test_full_precision_is_a_side_at_every_seed() -> None:
    to_fp = claim({"method": "edadm"}, {"method": "fp"})
    [(first, second)] = sides(to_fp, [fp(), record(seed=0), record(seed=1)]).values()
    assert {run.method for run in second.values()} == {"fp"} and first.keys() == second.keys() == {0, 1}
    assert sides(to_fp, [record()]) == {}
    assert sides(to_fp, [fp(n_images=512), record()]) == {}


def test_what_does_not_exist_is_named() -> None:
    tasks: dict[str, dict[int, int]] = {"cifar10_tiny": {}}
    assert absent_parts(claim({"method": "edadm"}, {"method": "qdiffusion"}, tasks=tasks)) == []
    absent = claim({"method": "edadm"}, {"method": "nothing", "calibration": "none_such"}, tasks=tasks)
    assert absent_parts(absent) == ["method nothing", "calibration none_such"]
    elsewhere = claim({"method": "edadm"}, {"method": "rtn"}, tasks={"far": {}, "away": {}})
    assert absent_parts(elsewhere) == ["task far or away"]


@pytest.mark.parametrize("name", ["I-9", "VII-5"])
def test_the_commands_of_a_claim_compose_and_fit_its_sides(name: str) -> None:
    [one] = [one for one in CLAIMS if one.id == name]
    for line, side in zip(commands(one, [0]), (one.first, one.second)):
        words = line.split()[3:]
        settings = config.settings(config.compose(words), words)
        parts = {slot: settings[f"{slot}.name"] for slot in config.SLOTS}
        fields = {"task": "cifar10_tiny", "variant": dict(settings.variant), "config": dict(settings.values)}
        made = record(side["method"], bits=settings.bits_name, **(parts | fields))
        assert fits(made, side, one.tasks["cifar10_tiny"])


def test_a_command_takes_the_rows_of_its_task() -> None:
    first = {"method": "edadm", "bits": "w4a8", "calibration": "tdac", "rows": 5120}
    one = claim(first, {"method": "fp"}, tasks={"cifar10_tiny": {5120: 1280}})
    assert commands(one, [0, 1]) == [
        "python run.py -m task=cifar10_tiny method=edadm bits=w4a8 calibration=tdac profile.rows=1280 seed=0,1"
    ]


def test_the_table_of_a_claim_runs_at_the_scale_that_speaks_to_it() -> None:
    found = {one.id: experiment_command(one) for one in CLAIMS}
    assert found["VI-1"] == "python run.py experiments=table6_ablation"
    assert found["II-1"] == "python run.py experiments=table2_lsun scale=paper"
    assert None not in found.values()
    assert experiment_command(claim({"method": "edadm"}, {"method": "rtn"})) is None


FILE = """
metrics: {FID: [fid, fd_tiny]}
fidelity: [sqnr]
tasks: {toy: {toy: {}}}
claims:
  - {id: a, source: s, task: toy, metric: FID, statement: t, first: {method: x}, second: %s}
"""


def test_claims_are_read(tmp_path: Path) -> None:
    (tmp_path / "claims.yaml").write_text(FILE % "{method: y, rows: 5}")
    found = load(tmp_path / "claims.yaml")
    assert found.fidelity == ("sqnr",)
    assert found.claims[0].metrics == ("fid", "fd_tiny")
    assert found.claims[0].second == {"method": "y", "rows": 5}


@pytest.mark.parametrize(
    ("second", "message"),
    [("{bits: w4a8}", "a side has a method"), ("{method: y, seeds: 3}", "a side has a method"), ("[", "malformed")],
)
def test_a_malformed_file_is_named(tmp_path: Path, second: str, message: str) -> None:
    path = tmp_path / "claims.yaml"
    path.write_text(FILE % second)
    with pytest.raises(EdadmError, match=message) as raised:
        load(path)
    assert str(path) in str(raised.value)
    with pytest.raises(EdadmError, match="no claims at"):
        load(tmp_path / "none.yaml")

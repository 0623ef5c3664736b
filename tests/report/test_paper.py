from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from edadm.checkout import root
from edadm.errors import EdadmError
from edadm.report import paper
from tests.report.paper_records import SITES
from tests.report.records_for_tests import record

# cells and printed lines of each table
SIZES = {
    "I": (45, 15), "II": (81, 27), "III": (52, 13), "IV": (36, 9), "V": (12, 12), "VI": (12, 4), "VII": (36, 18),
    "VIII": (15, 5), "IX": (78, 26), "X": (15, 3), "XI": (8, 2),
}  # fmt: skip


@pytest.mark.parametrize("table", SIZES)
def test_every_printed_cell_is_there(table: str) -> None:
    cells = paper.read(table)
    assert (len(cells), len({(cell.row, cell.task) for cell in cells})) == SIZES[table]
    assert {cell.table for cell in cells} == {table}
    assert len({(cell.row, cell.task, cell.metric) for cell in cells}) == len(cells)


@pytest.mark.parametrize(
    ("table", "columns", "metric", "value"),
    [
        ("I", {"method": "EDA-DM", "bits": "W4A8"}, "FID", 4.03),
        ("I", {"method": "FP"}, "IS", 9.03),
        ("II", {"task": "LSUN-Bedroom", "method": "EDA-DM", "bits": "W4A8"}, "sFID", 6.59),
        ("II", {"task": "LSUN-Church", "method": "PTQD", "bits": "W8A8"}, "FID", 4.13),
        ("III", {"method": "TCAQ-DM", "bits": "W4A8"}, "FID", 9.97),
        ("IV", {"method": "Q-Diffusion", "bits": "W4A8"}, "CLIP", 26.29),
        ("V", {"task": "DrawBench", "method": "EDA-DM"}, "Aesthetic", 5.66),
        ("VI", {"method": "+FBR"}, "IS", 354.16),
        ("VII", {"task": "CIFAR-10 DDIM calibration=5120", "method": "TSC"}, "FID", 4.93),
        ("VIII", {"task": "Stable-Diffusion on COCO"}, "lambda1_TDAC", 5.0),
        ("IX", {"task": "LDM-4 ImageNet PLMS steps=20", "method": "PTQD", "bits": "W4A8"}, "sFID", 5.96),
        ("X", {"method": "APQ-DM"}, "Bops_G", 436),
        ("XI", {"method": "EDA-DM"}, "Runtime_ms", 191),
    ],
)
def test_known_cells(table: str, columns: dict[str, str], metric: str, value: float) -> None:
    assert paper.line_of(paper.read(table), columns)[metric].number == value


def test_numbers_that_the_paper_prints_twice_agree() -> None:
    def fid(table: str, **columns: str) -> float | None:
        return paper.line_of(paper.read(table), columns)["FID"].number

    for bits in ("W8A8", "W4A8"):
        for method in ("Q-Diffusion", "PTQD", "EDA-DM"):
            repeated = fid("IX", task="LDM-4 ImageNet DDIM steps=20", method=method, bits=bits)
            assert fid("III", method=method, bits=bits) == repeated
    assert fid("VI", method="+TDAC+FBR") == fid("III", method="EDA-DM", bits="W4A8")
    assert fid("X", method="EDA-DM") == fid("I", method="EDA-DM", bits="W8A8")


@pytest.mark.parametrize(
    ("table", "columns", "metric", "doubt"),
    [
        ("I", {"method": "ADP-DM", "bits": "W8A8"}, "FID", "doubtful"),
        ("II", {"task": "LSUN-Bedroom", "method": "TFMQ-DM", "bits": "W4A8"}, "sFID", "1.06"),
        ("II", {"task": "LSUN-Church", "method": "EDA-DM", "bits": "W4A8"}, "FID", "below the FP row"),
        ("III", {"method": "EDA-DM", "bits": "W4A8"}, "FID", "not monotone"),
        ("IV", {"method": "EDA-DM", "bits": "W4A8"}, "sFID", "against the text"),
        ("VI", {"method": "+FBR"}, "IS", "better than +TDAC+FBR"),
        ("VII", {"task": "CIFAR-10 DDIM calibration=1024", "method": "NDTC"}, "FID", "bit-width not printed"),
        ("IX", {"task": "LDM-4 ImageNet DDIM steps=250", "method": "FP"}, "IS", "guidance scale not printed"),
        ("X", {"method": "APQ-DM"}, "ModelSize_MB", "not derivable"),
    ],
)
def test_a_doubtful_cell_says_so(table: str, columns: dict[str, str], metric: str, doubt: str) -> None:
    assert doubt in paper.line_of(paper.read(table), columns)[metric].note


@pytest.mark.parametrize(("name", "lines"), [("text-claims.csv", 15), ("others.csv", 603)])
def test_the_other_files_are_whole(name: str, lines: int) -> None:
    with open(root() / paper.PRINTED / name, encoding="utf-8", newline="") as file:
        assert len(list(csv.DictReader(file))) == lines


def test_a_dash_is_no_number() -> None:
    cell = paper.line_of(paper.read("III"), {"method": "TFMQ-DM", "bits": "W8A8"})["IS"]
    assert (cell.value, cell.number, cell.images) == ("-", None, 50000)


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"method": "nobody"}, "no printed line has method=nobody"), ({"bits": "W4A8"}, "more than one printed line")],
)
def test_columns_must_choose_one_line(columns: dict[str, str], message: str) -> None:
    with pytest.raises(EdadmError, match=message):
        paper.line_of(paper.read("I"), columns)


def test_printed_numbers_belong_to_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDADM_ROOT", str(tmp_path))
    with pytest.raises(EdadmError, match="belong to the checkout"):
        paper.read("I")


def test_the_metric_of_the_paper_is_preferred_to_its_proxy() -> None:
    proxy = record()
    assert paper.stand_in("FID", [proxy]) == "fd_tiny"
    assert paper.stand_in("FID", [proxy, replace(proxy, metrics={"fid": {"value": 1.0}})]) == "fid"
    assert paper.stand_in("Runtime_ms", [proxy]) is None


def test_costs_are_in_the_units_of_the_paper() -> None:
    cost = {"bit_operations": 398.9e9, "size_mb": 35.9, "act_parameter_sets": 32}
    run = record(cost=cost, sites=SITES)
    assert [paper.value_of(run, name) for name in paper.COSTS] == [398.9, 35.9, 8.0]  # 4 activation quantizers
    assert paper.value_of(record(), "Bops_G") is None


def test_friendly_is_one_set_and_an_untouched_sampler() -> None:
    assert paper.is_friendly(record())
    assert not paper.is_friendly(record(activation_sets="per_step"))
    assert not paper.is_friendly(record(correction="ptqd"))

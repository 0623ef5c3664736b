from __future__ import annotations

import dataclasses
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from edadm.diagnostics.files import Diagnostic
from edadm.errors import EdadmError
from edadm.records import Record
from edadm.report.figure_registry import FIGURES
from edadm.report.figures_activation import most_moving, widths
from edadm.report.figures_pairs import by_line, groups, measured, spaced
from tests.report.records_for_tests import fp, record

STEPS = 5
UNITS = ("conv_in", "down_blocks.0.resnets.0", "down_blocks.0.resnets.1", "conv_out")


def diagnostic(name: str, run: Record, values: dict[str, Any]) -> Diagnostic:
    return Diagnostic(name, 1, run.hash, run.task, values, 1.0)


def ranges(*, quantizer: bool) -> dict[str, Any]:
    sites = [
        {
            "name": f"{unit}.act_quantizer",
            "role": f"role{index}",
            "unit": unit,
            "min": [-1.0] * STEPS,
            "max": [1.0 + index * step for step in range(STEPS)],
            "quantiles": [[-0.9, -0.5, 0.0, 0.5, 0.9]] * STEPS,
            "quantizer": {"bits": 8, "low": -1.5, "high": 1.5} if quantizer and index else None,
        }
        for index, unit in enumerate(UNITS)
    ]
    quantiles = [0.01, 0.25, 0.5, 0.75, 0.99]
    return {"n": {"trajectories": 32, "steps": STEPS}, "unit": {}, "quantiles": quantiles, "sites": sites}


def losses(block: float, front: float, granularity: str) -> dict[str, Any]:
    def compared(ratio: float) -> dict[str, Any]:
        return {"before": 2.0, "after": 2 * ratio, "ratio": ratio, "interval": [ratio - 0.1, ratio + 0.1]}

    parts = [
        {"unit": unit, "kind": "block", "part": part, "front": part != "output"}
        | {"training": compared(ratio), "held_out": compared(1.1 * ratio)}
        for unit in UNITS
        for part, ratio in (("output", block), ("conv1", front))
    ]
    means = {
        name: {"training": {"parts": 4, "ratio": ratio}, "held_out": {"parts": 4, "ratio": 1.1 * ratio}}
        for name, ratio in (("block outputs", block), ("front layers", front))
    }
    n = {"training rows": 128, "held-out rows": 128, "held-out trajectories": 60}
    return {"n": n, "unit": {}, "granularity": granularity, "parts": parts, "summary": means}


def rounding(undecided: float) -> dict[str, Any]:
    units = [
        {"unit": unit, "block": unit, "weights": 10, "undecided": undecided, "changed": 0.1, "iterations": 20}
        for unit in UNITS
    ]
    n = {"units": 4, "weights": 40, "iterations": 20}
    return {"n": n, "unit": {}, "units": units, "undecided": undecided, "changed": 0.1}


def samples() -> dict[str, Any]:
    chosen = {
        "counts": [2] * STEPS,
        "total_variation": 0.0,
        "distance": 0.01,
        "points": [[float(i), float(i % 3)] for i in range(2 * STEPS)],
        "steps": [i // 2 for i in range(2 * STEPS)],
    }
    return {
        "n": {"rows": 10, "trajectories": 12, "steps": STEPS},
        "unit": {},
        "space": "middle features",
        "explained": [0.5, 0.2],
        "own": [[[float(step), float(row)] for row in range(12)] for step in range(STEPS)],
        "by_chance": [0.02, 0.01],
        "samplers": {"random": chosen, "tdac": chosen, "tss": {"reason": "needs a network"}},
    }


def scores() -> dict[str, Any]:
    curve = [float(step) for step in range(STEPS)]
    return {
        "n": {"steps": STEPS, "feature trajectories": 12, "loss trajectories": 32},
        "unit": {},
        "threshold": 0.5,
        "curves": {"density": curve, "variety": curve, "ndtc": [0.2] * STEPS, "loss": curve},
        "correlations": [
            {"of": ["density", "ndtc"], "pearson": None, "spearman": None},
            {"of": ["variety", "loss"], "pearson": 1.0, "spearman": 0.9},
        ],
    }


@pytest.fixture
def runs() -> list[Record]:
    curve = {"sqnr_per_step": {"values": [30.0, 20.0, 10.0], "n": 32, "unit": "dB"}}
    block = {"variant": {"reconstruction": "block"}, "config": {"reconstruction": "block"}}
    return [fp(), *(record("edadm", seed, metrics=curve) for seed in range(2)), record("edadm", metrics=curve, **block)]


@pytest.fixture
def everything(runs: list[Record]) -> list[Diagnostic]:
    found = [diagnostic("activation_range", runs[0], ranges(quantizer=False))]
    for run in runs[1:]:
        granularity = run.variant.get("reconstruction", "fbr")
        found += [
            diagnostic("activation_range", run, ranges(quantizer=True)),
            diagnostic("reconstruction_loss", run, losses(0.7, 1.3 if granularity == "block" else 0.8, granularity)),
            diagnostic("soft_rounding", run, rounding(0.5)),
            diagnostic("sample_distribution", run, samples()),
            diagnostic("scores", run, scores()),
        ]
    return found


@pytest.mark.parametrize(
    ("name", "files", "texts"),
    [
        ("fig3", ["fig3_activation_range", "fig3_activation_range_all"], ["n=32 trajectories"]),
        (
            "fig4",
            ["fig4_reconstruction_loss", "fig4_reconstruction_loss_units"],
            ["n=128 calibration rows, n=128 held-out rows of 60 trajectories", "edadm, W4A8, fbr (2 seeds)"],
        ),
        ("fig5", ["fig5_sample_distribution"], ["rows per step, n=10", "n=10 rows"]),
        ("fig11", ["fig11_scores"], ["n=12 trajectories", "Pearson 1.00, Spearman 0.90 over 5 steps"]),
        ("soft_rounding", ["soft_rounding"], ["n=40 weights"]),
        ("sqnr", ["sqnr_per_step"], ["n=32"]),
    ],
)
def test_a_figure_is_a_png_and_an_svg_with_its_n(
    name: str, files: list[str], texts: list[str], runs: list[Record], everything: list[Diagnostic], tmp_path: Path
) -> None:
    written = FIGURES[name](runs, everything, tmp_path)
    assert [path.name for path in written] == [f"{file}{suffix}" for file in files for suffix in (".png", ".svg")]
    for picture, drawing in zip(written[::2], written[1::2]):
        assert Image.open(picture).size[0] >= 700
        content = ElementTree.parse(drawing)
        assert content.getroot().tag.endswith("svg")
        shown = " ".join("".join(element.itertext()) for element in content.iter() if element.tag.endswith("text"))
        assert texts[0] in shown
        assert "nan" not in shown and "None" not in shown
    assert all(text in shown for text in texts)


@pytest.mark.parametrize("name", ["fig3", "fig4", "fig5", "fig11", "soft_rounding"])
def test_the_same_numbers_give_the_same_bytes(
    name: str, runs: list[Record], everything: list[Diagnostic], tmp_path: Path
) -> None:
    one, other = (FIGURES[name](runs, everything, tmp_path / part) for part in "ab")
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in other]


@pytest.mark.parametrize("name", ["fig3", "fig4", "fig5", "fig11", "soft_rounding"])
def test_a_figure_without_its_diagnostic_says_how_to_make_it(name: str, runs: list[Record], tmp_path: Path) -> None:
    with pytest.raises(EdadmError, match=r"diagnostics=\["):
        FIGURES[name](runs, [], tmp_path)
    assert not list(tmp_path.iterdir())


def test_tasks_get_files_of_their_own(runs: list[Record], everything: list[Diagnostic], tmp_path: Path) -> None:
    other = dataclasses.replace(runs[1], hash="f" * 16, task="latent")
    found = [*everything, diagnostic("scores", other, scores())]
    names = {path.name for path in FIGURES["fig11"]([*runs, other], found, tmp_path)}
    assert names == {f"fig11_scores_{task}.{suffix}" for task in ("toy", "latent") for suffix in ("png", "svg")}


def test_records_and_diagnostics_are_joined_by_the_hash_of_the_run(
    runs: list[Record], everything: list[Diagnostic]
) -> None:
    pairs = measured(runs[1:], everything, "soft_rounding")
    assert {label: len(found) for label, found in by_line(pairs).items()} == {
        "edadm, W4A8": 2,
        "edadm (reconstruction=block), W4A8": 1,
    }
    failed = [dataclasses.replace(run, status="failed", reason="x") for run in runs[1:]]
    with pytest.raises(EdadmError):
        measured(failed, everything, "soft_rounding")


def test_the_sites_that_move_most_come_first_one_of_each_role() -> None:
    sites = ranges(quantizer=False)["sites"]
    assert widths(sites[1]) == [2, 3, 4, 5, 6]
    assert [site["name"] for site in most_moving(sites, 2)] == ["conv_out.act_quantizer", f"{UNITS[2]}.act_quantizer"]
    same_role = [site | {"role": "same"} for site in sites]
    assert len(most_moving(same_role, 4)) == 1
    constant = [{**sites[0], "max": [-1.0] * STEPS}]
    assert most_moving(constant, 4) == []


def test_units_are_grouped_by_the_part_of_the_network() -> None:
    assert groups(UNITS) == [(0, "conv_in"), (1, "down_blocks.0"), (3, "conv_out")]
    assert groups(["transformer_blocks.10", "transformer_blocks.11"]) == [
        (0, "transformer_blocks.10"),
        (1, "transformer_blocks.11"),
    ]
    assert spaced([(0, "a"), (1, "b"), (4, "c")], 100, 0.025) == [(0, "a"), (4, "c")]


def test_a_loss_that_was_zero_leaves_a_gap(runs: list[Record], tmp_path: Path) -> None:
    values = losses(0.7, 0.8, "fbr")
    for part in values["parts"][:2]:
        part["training"] = part["held_out"] = {"before": 0.0, "after": 0.0, "ratio": None, "interval": None}
    written = FIGURES["fig4"]([runs[1]], [diagnostic("reconstruction_loss", runs[1], values)], tmp_path)
    assert all("NaN" not in path.read_text() and "nan" not in path.read_text() for path in written[1::2])

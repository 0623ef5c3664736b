from __future__ import annotations

import math
from pathlib import Path

import pytest
from PIL import Image

from edadm.errors import EdadmError
from edadm.records import Record
from edadm.report import figures
from edadm.report.figures import step_curves
from tests.report.records_for_tests import fp, record


def curve(method: str, seed: int, level: float, steps: int = 5, **fields: object) -> Record:
    values = [level + step + 0.1 * seed for step in range(steps)]
    return record(method, seed, metrics={"sqnr_per_step": {"values": values, "n": 64, "unit": "dB"}}, **fields)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list:
    """The axes that were drawn, to ask what a reader sees."""
    from matplotlib.figure import Figure

    found: list = []
    subplots = Figure.subplots
    monkeypatch.setattr(Figure, "subplots", lambda self: found.append(subplots(self)) or found[-1])
    return found


def test_one_line_a_method_with_units_n_and_seeds(tmp_path: Path, drawn: list) -> None:
    runs = [curve(method, seed, level) for method, level in (("edadm", 20.0), ("rtn", 8.0)) for seed in range(3)]
    path = step_curves([fp(), *runs], tmp_path / "steps.png")
    assert Image.open(path).size[0] > 500
    [axes] = drawn
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "edadm, W4A8 (3 seeds)",
        "rtn, W4A8 (3 seeds)",
    ]
    assert axes.get_ylabel() == "noise-prediction SQNR (dB), n=64"
    assert list(axes.lines[0].get_ydata()) == pytest.approx([20.1, 21.1, 22.1, 23.1, 24.1])
    assert len(axes.collections) == 2


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    runs = [curve("edadm", seed, 20.0) for seed in range(2)]
    one, other = step_curves(runs, tmp_path / "a.png"), step_curves(runs, tmp_path / "b.png")
    assert one.read_bytes() == other.read_bytes()


def test_bits_are_lines_of_their_own_and_infinity_is_a_gap(tmp_path: Path, drawn: list) -> None:
    perfect = record("rtn", bits="w8a8", metrics={"sqnr_per_step": [math.inf] * 4 + [30.0]})
    step_curves([curve("edadm", 0, 20.0), perfect], tmp_path / "steps.png")
    labels = [text.get_text() for text in drawn[0].get_legend().get_texts()]
    assert labels == ["rtn, W8A8 (1 seed)", "edadm, W4A8 (1 seed)"]
    assert [math.isnan(value) for value in drawn[0].lines[0].get_ydata()] == [True] * 4 + [False]


def test_runs_of_other_lengths_do_not_share_a_line(tmp_path: Path) -> None:
    with pytest.raises(EdadmError, match="sampling steps"):
        step_curves([curve("edadm", 0, 20.0), curve("edadm", 1, 20.0, steps=7)], tmp_path / "steps.png")
    assert not list(tmp_path.iterdir())


def test_without_curves_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(EdadmError, match=figures.STEP_CURVE):
        step_curves([fp(), record()], tmp_path / "steps.png")

from __future__ import annotations

import pytest

from edadm.report.sheet import Line, Note, Sheet, write

SHEET = Sheet(
    "a & b",
    ("what", "x"),
    (Line(("one", "1 ± 2"), frozenset({1})), Line(("<two>", "3 (!)"), kind="fp", title="0123")),
    (Note("read this"), Note("missing", "python run.py a_b=1")),
    "below",
)


def test_markdown() -> None:
    assert write([SHEET], [], "markdown", "t") == (
        "## a & b\n\nbelow\n\n| what  |         x |\n| ----- | --------: |\n| one   | **1 ± 2** |\n| <two> |     3 (!) |\n"
        "\n- read this\n- missing: `python run.py a_b=1`\n"
    )


def test_a_sheet_without_lines_is_its_heading_and_notes() -> None:
    assert write([Sheet("empty", (), (), (Note("n"),))], [], "markdown", "t") == "## empty\n\n- n\n"


def test_latex_escapes_and_closes() -> None:
    text = write([SHEET], [], "latex", "t")
    assert r"\caption{a \& b. below}" in text
    assert r"one & \textbf{1 $\pm$ 2} \\" in text
    assert r"missing: python run.py a\_b=1" in text
    assert text.count(r"\begin{") == text.count(r"\end{") == 2


def test_html_escapes_and_marks() -> None:
    text = write([SHEET], [], "html", "t<")
    assert "<title>t&lt;</title>" in text
    assert '<tr class="fp" title="0123"><td>&lt;two&gt;</td><td class="off">3 (!)</td></tr>' in text
    assert "<strong>1 ± 2</strong>" in text and "<code>python run.py a_b=1</code>" in text


def test_csv_holds_the_lines_as_they_are() -> None:
    assert write([SHEET], [{"a": 1, "b": None}, {"a": 0.5, "b": "x"}], "csv", "t") == "a,b\n1.0,\n0.5,x\n"


@pytest.mark.parametrize("style", ["markdown", "latex", "html"])
def test_several_sheets_follow_each_other(style: str) -> None:
    assert write([SHEET, SHEET], [], style, "t").count("read this") == 2


def test_a_sheet_without_columns_is_no_tabular() -> None:
    text = write([Sheet("no contest", (), (), (Note("why"),))], [], "latex", "t")
    assert "tabular" not in text and "why" in text and text.count("table}") == 2

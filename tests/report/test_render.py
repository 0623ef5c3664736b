from __future__ import annotations

import io
import math
from pathlib import Path

import pandas as pd
import pytest

from edadm.records import Record
from edadm.report import render
from edadm.report.table import tables
from tests.report.records_for_tests import fp, metric, record, resampled


@pytest.fixture
def records() -> list[Record]:
    runs = [record(method, seed, fd=fd + seed) for method, fd in (("edadm", 10.0), ("rtn", 40.0)) for seed in range(3)]
    return [
        fp(expected_band={"fd_tiny": [6.0, 8.0]}),
        *runs,
        record("brecq", status="failed", reason="a_b & 5 %", metrics={}),
    ]


MARKDOWN = """\
## toy, W4A8, scope full, preset released, profile reference, n=2048

| method | fd_tiny ↓ (proxy) |  sqnr ↑ (dB) | seeds | images | quant. s | peak MiB |
| ------ | ----------------: | -----------: | ----: | -----: | -------: | -------: |
| FP     |          5.00 (!) |          n/a |     1 |   2048 |          |          |
| edadm  |  **11.00 ± 1.00** | 20.00 ± 0.00 |     3 |   2048 |     66.0 |      900 |
| rtn    |      41.00 ± 1.00 | 20.00 ± 0.00 |     3 |   2048 |     66.0 |      900 |

- (!) FP has fd_tiny 5, outside of [6, 8] that the task expects: explain this before trusting any row.
"""


DIFFERENCES = """\
## toy, W4A8, scope full, preset released, profile reference, n=2048: minus edadm

| method |           fd_tiny ↓ (proxy) |          sqnr ↑ (dB) | seeds |
| ------ | --------------------------: | -------------------: | ----: |
| rtn    | **+30.00 [+29.84, +30.16]** | +0.00 [-0.16, +0.16] |     3 |
"""


def test_markdown_is_what_a_person_expects(records: list[Record]) -> None:
    text = render.markdown(tables(records[:-1], resampled(records)))
    assert text.startswith(MARKDOWN)
    assert DIFFERENCES in text
    assert "- Proxies (fd_tiny): " in text
    assert "not comparable with published FID" in text
    assert "reference.sha256 aaaaaaaaaaaa…; precision fp32; softmax bits 8" in text
    assert f"edadm {records[1].hash[:8]} {records[2].hash[:8]} {records[3].hash[:8]}" in text


def test_the_demo_heading_is_exact() -> None:
    demo = {"profile": "demo", "n_images": 256}
    text = render.markdown(tables([fp(**demo), record(fd=9.0, **demo), record("rtn", **demo)]))
    assert text.splitlines()[0] == "## demo profile, n=256: too few for a verdict"
    assert "**" not in text


@pytest.mark.parametrize("style", [render.markdown, render.csv, render.latex, lambda found: render.page(found, "t")])
def test_every_format_is_stable_to_the_byte(records: list[Record], style) -> None:
    assert style(tables(records)) == style(tables(records[::-1]))


def test_a_proxy_of_many_images_is_comparable_with_nothing_published() -> None:
    runs = [record(n_images=5000, metrics={"fd_tiny": metric(1.0, proxy=True), "fid": metric(2.0)})]
    found = pd.read_csv(io.StringIO(render.csv(tables(runs)))).query("method == 'edadm'").set_index("metric")
    assert found["comparable_with_published"].to_dict() == {"fd_tiny": False, "fid": True}


def test_csv_reads_back_with_pandas(records: list[Record]) -> None:
    found = pd.read_csv(io.StringIO(render.csv(tables(records, resampled(records)))))
    line = found[(found["method"] == "edadm") & (found["metric"] == "fd_tiny")].iloc[0]
    assert (line["mean"], line["std"], line["best"], line["seeds"]) == (11.0, 1.0, True, "0 1 2")
    assert not line["comparable_with_published"]
    assert set(found[found["method"] == "brecq"]["status"]) == {"failed"}
    assert found[found["method"] == "FP"]["outside_expected_band"].any()
    assert (line["minus_FP"], line["minus_FP_seeds"]) == (6.0, 3)
    assert line["minus_FP_low"] < 6.0 < line["minus_FP_high"] and math.isnan(line["minus_edadm"])
    rtn = found[(found["method"] == "rtn") & (found["metric"] == "fd_tiny")].iloc[0]
    assert [rtn["minus_edadm"], rtn["minus_edadm_without_bias"]] == pytest.approx([30.0, 30.0])


def test_a_single_seed_says_what_its_interval_leaves_out() -> None:
    runs = [record("edadm", fd=10.0), record("rtn", fd=12.0)]
    text = render.markdown(tables(runs, resampled(runs)))
    assert "With one seed the interval covers images only" in text
    assert "**" not in text


def test_latex_escapes_and_closes(records: list[Record]) -> None:
    text = render.latex(tables(records, resampled(records)))
    assert r"fd\_tiny $\downarrow$ (proxy)" in text
    assert r"\textbf{11.00 $\pm$ 1.00}" in text
    assert r"failed: a\_b \& 5 \%" in text
    assert text.count(r"\begin{") == text.count(r"\end{")
    assert not set("±↑↓…") & set(text)


def test_html_is_one_file_that_needs_nothing_else(records: list[Record], tmp_path: Path) -> None:
    picture = tmp_path / "x.png"
    picture.write_bytes(b"png")
    text = render.page(tables(records, resampled(records)), "a <b>", [("curve", picture)])
    assert "a &lt;b&gt;" in text
    assert "<strong>11.00 ± 1.00</strong>" in text
    assert '<td class="off">5.00 (!)</td>' in text
    assert "failed: a_b &amp; 5 %" in text
    assert 'src="data:image/png;base64,cG5n"' in text
    assert "http" not in text


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ((4.26, 9.0), ("4.260", "9.000")),
        ((12.345, 0.012), ("12.35", "0.01")),
        ((1234.5, 2.0), ("1234", "2")),
        ((0.01234, 0.5), ("0.0123", "0.5000")),
        ((math.inf, 2.0), ("∞", "2.000")),
        ((-3.5, 0.0), ("-3.500", "0.000")),
    ],
)
def test_a_column_shows_four_digits_of_its_largest_value(values: tuple[float, float], texts: tuple[str, str]) -> None:
    runs = [record(name, metrics={"x": metric(value)}) for name, value in zip(("a", "b"), values)]
    [table] = tables(runs)
    assert tuple(render._texts(table, row)[1][0] for row in table.rows[1:]) == texts


def test_pipes_and_line_breaks_do_not_break_the_table() -> None:
    text = render.markdown(tables([record(variant={"recipe": "a|b\nc"})]))
    assert "edadm (recipe=a\\|b c)" in text

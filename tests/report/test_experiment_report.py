from __future__ import annotations

import csv
from pathlib import Path

import pytest

from edadm.checkout import root
from edadm.comparison import write_draws
from edadm.errors import EdadmError
from edadm.records import Record, path_of, write
from edadm.report import paper_figures
from edadm.report.__main__ import main
from edadm.report.experiment_file import load, names
from edadm.report.experiment_report import read_located
from edadm.report.paper_settings import settings_lines
from edadm.report.paper_sheets import number, row_label, run_label
from tests.report.paper_records import draws_of, run_of, scored
from tests.report.records_for_tests import metric

ABLATION = load("table6_ablation")


def save(runs: list[Record], folder: Path) -> Path:
    for run in runs:
        write(run, folder)
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Three seeds of the baseline and of +TDAC, one of +FBR, with draws."""
    distances = {0: [1.0, 1.1, 1.2], 1: [0.5, 0.6, 0.7], 2: [0.9]}
    runs = [
        run_of(ABLATION.rows[i], seed, scored(fd)) for i, found in distances.items() for seed, fd in enumerate(found)
    ]
    save(runs, tmp_path / "results")
    for run in runs:
        write_draws(draws_of(run, spread=0.001), tmp_path / "results")
    return tmp_path / "results"


def shown(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words]) == 0
    return capsys.readouterr().out


def cells(text: str, label: str) -> list[str]:
    """The cells of the first line of a Markdown table that begins with a label."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_ours_stands_beside_the_paper_with_a_verdict(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "table6_ablation", "--results", str(results))
    assert text.startswith("## Table VI: Contribution of TDAC and FBR, FID\n")
    assert "fd_tiny for FID: judged is the direction of an effect, never a level" in text
    _, run, paper, ours, printed_effect, effect, seeds, verdict = cells(text, "+TDAC")
    assert (run, paper, ours, printed_effect) == ("tdac block", "10.75", "0.6000 ± 0.1000", "-5.48")
    assert effect.startswith("-0.5 [") and (seeds, verdict) == ("3 of 3", "same direction")
    assert cells(text, "+FBR")[-2:] == ["1 of 3", "undecided at n=2000, 1 seed"]
    assert cells(text, "+TDAC+FBR")[-2:] == ["0 of 3", "not run"]
    assert "under 5,000, not comparable with published FID" in text


def test_what_is_missing_has_its_command(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "table6_ablation", "--results", str(results))
    command = "python run.py -m experiments=table6_ablation calibration={} reconstruction=fbr"
    assert f"- Not run: random fbr, seed 1, 2: `{command.format('random')} seed=1,2`" in text
    assert f"- Not run: tdac fbr, seed 0, 1, 2: `{command.format('tdac')}`" in text
    assert text.count("- Not run: ") == 2


def test_seeds_without_a_result_are_named_and_not_run_again(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = run_of(ABLATION.rows[2], 1, status="diverged", reason="NaN in the loss\nmore")
    failed = run_of(ABLATION.rows[2], 2, status="failed", reason="out of memory")
    save([lost, failed], results)
    text = shown(capsys, "table6_ablation", "--results", str(results))
    command = "python run.py -m experiments=table6_ablation calibration=random reconstruction=fbr seed=2"
    assert "- Diverged: random fbr, seed 1: NaN in the loss\n" in text
    assert f"- Failed: random fbr, seed 2: out of memory: `{command}`" in text
    assert "Not run: random fbr" not in text
    assert cells(text, "+FBR")[-1] == "undecided at n=2000, 1 seed (1 seed diverged, 1 seed failed)"


def test_results_of_older_versions_are_counted_below(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    newer = scored(0.9) | {"fd_tiny": metric(0.9, version=2)}
    save([run_of(ABLATION.rows[3], 0, newer)], results)
    text = shown(capsys, "table6_ablation", "--results", str(results))
    assert "- fd_tiny: 7 results of an older version of the metric left out." in text
    assert cells(text, "+TDAC")[-1] == "not measured"


def test_nearness_to_full_precision_follows(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "table6_ablation", "--results", str(results))
    near = text[text.index("nearness to full precision") :]
    assert cells(near, "tdac block")[1:] == ["19.40 ± 0.10", "3"]


def test_without_any_record_the_printed_numbers_stand_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "table6_ablation", "--results", str(tmp_path))
    assert cells(text, "+TDAC")[2:] == ["10.75", "", "-5.48", "", "0 of 3", "not run"]
    assert "- Nothing has run yet: `python run.py -m experiments=table6_ablation`" in text


def test_what_is_doubtful_in_print_stands_under_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "table1_cifar10", "--results", str(tmp_path))
    assert "- Printed numbers: identical to the TFMQ-DM W8A8 row: doubtful (ADP-DM W8A8)." in text


@pytest.mark.parametrize("scale", ["tiny", "paper"])
@pytest.mark.parametrize("name", names())
def test_every_experiment_is_rendered_without_records(
    name: str, scale: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, name, "--scale", scale, "--results", str(tmp_path))
    assert text.startswith(f"## {load(name).source}: {load(name).title}")


def test_csv_has_one_line_for_each_row_and_metric(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = shown(capsys, "table6_ablation", "--results", str(results), "--format", "csv").strip()
    with open(path, encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 12
    tdac = next(line for line in lines if (line["row"], line["metric"]) == ("+TDAC", "FID"))
    assert (tdac["paper"], tdac["mean"], tdac["n"], tdac["verdict"]) == ("10.75", "0.6", "2000", "same direction")
    assert (
        tdac["run"].startswith("task=cifar10_ldm_tiny profile=reference method=edadm")
        and len(tdac["records"].split()) == 3
    )


@pytest.mark.parametrize(("style", "sign"), [("latex", r"\begin{tabular}"), ("html", "<td>10.75</td>")])
def test_other_formats_are_files(results: Path, style: str, sign: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(shown(capsys, "table6_ablation", "--results", str(results), "--format", style).strip())
    assert path.parent == results / "report" and sign in path.read_text(encoding="utf-8")


def test_records_of_both_default_folders_are_read(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDADM_ROOT", str(root()))
    monkeypatch.chdir(tmp_path)
    results.rename(results.with_name("moved"))
    (tmp_path / "results").mkdir()
    (tmp_path / "moved").rename(tmp_path / "results" / "reference")
    save([run_of(ABLATION.rows[3], 0, scored(0.4))], tmp_path / "results" / "local")
    text = shown(capsys, "table6_ablation")
    assert cells(text, "+TDAC")[-2] == "3 of 3" and cells(text, "+TDAC+FBR")[-2] == "1 of 3"
    assert Path(shown(capsys, "table6_ablation", "--format", "csv").strip()).parent == Path("results/local/report")


def test_without_any_results_folder_the_printed_numbers_are_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDADM_ROOT", str(root()))
    monkeypatch.chdir(tmp_path)
    assert "16.23" in shown(capsys, "table6_ablation")
    assert main([]) == 1
    assert "no results folder results/local" in capsys.readouterr().err


def test_the_list_counts_the_runs_with_a_record(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "--experiments", "--results", str(results))
    assert cells(text, "table6_ablation") == [
        "table6_ablation",
        "Table VI",
        _marked("imagenet_ldm4"),
        "cifar10_ldm_tiny",
        "7 of 12",
    ]
    assert "deployment int8" in cells(text, "table11_deployment")[-1]
    assert len([line for line in text.splitlines() if line.startswith(("| table", "| fig"))]) == 20


def _marked(task: str) -> str:
    return task if (root() / "conf" / "task" / f"{task}.yaml").is_file() else f"{task}*"


def test_an_unknown_name_points_to_the_list(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table99", "--results", str(results)]) == 1
    assert "`python -m edadm.report --experiments`" in capsys.readouterr().err


def test_settings_are_read_from_the_files_of_the_task() -> None:
    lines = {
        line["name"]: line for line in settings_lines(load("table8_hyperparameters")) if line["task"] == "cifar10_tiny"
    }
    assert {name: (line["paper"], line["ours"], line["verdict"]) for name, line in lines.items()} == {
        "calibration_samples": ("1024", 256, "differs"),  # the embedded counterparts run profile=reference
        "lambda1_TDAC": ("1.2", 1.2, "reproduced"),
        "lambda2_FBR": ("0.8", 0.8, "reproduced"),
    }


def test_settings_of_the_paper_scale_are_those_of_its_profile() -> None:
    lines = settings_lines(load("table8_hyperparameters", "paper"))
    (rows,) = [line for line in lines if (line["task"], line["name"]) == ("cifar10_ddim", "calibration_samples")]
    assert (rows["ours"], rows["verdict"]) == (1024, "reproduced")


def test_the_aesthetic_score_has_no_embedded_counterpart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "table5_aesthetic", "--results", str(tmp_path))
    assert "not available yet: task cifar10_ldm_tiny_aesthetic" in text and "Nothing has run yet" not in text


def test_figure_10_has_the_images_of_the_paper() -> None:
    assert {row.words["profile.images"] for row in load("fig10_hyperparameters", "paper").rows} == {"10000"}


def test_rows_of_several_printed_tables_carry_the_end_of_their_task() -> None:
    table = load("table9_samplers_steps")
    assert row_label(table, table.rows[1]) == "DDIM steps=20: Q-Diffusion W8A8"
    assert run_label(table, table.rows[1]) == "ddim_leading sampler.steps=20 sampler.guidance_scale=3.0 qdiffusion w8a8"
    assert row_label(ABLATION, ABLATION.rows[0]) == "baseline"


@pytest.mark.parametrize(
    ("value", "text"), [(0.00123456, "0.001235"), (12.3456, "12.35"), (12345.6, "12346"), (0.0, "0")]
)
def test_numbers_have_four_significant_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_a_spread_has_the_decimals_of_its_number() -> None:
    assert number(12.3456, 0.98765) == "12.35 ± 0.99"


def grid_runs() -> list[Record]:
    grid = load("fig10_hyperparameters")

    def metrics(index: int) -> dict[str, object]:
        level = 20 + index / 10
        return {
            "sqnr": metric(level, higher=True, n=32, interval=[level - 0.2, level + 0.2]),
            "fd_tiny_to_fp": metric(0.2 - index / 100, n=2000, proxy=True),
        }

    return [run_of(row, 0, metrics(index)) for index, row in enumerate(grid.rows)]


def test_the_lambda_grid_is_drawn_as_png_and_svg(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(grid_runs(), tmp_path / "results")
    words = ["fig10_hyperparameters", "--results", str(tmp_path / "results"), "--out", str(tmp_path / "out")]
    assert main([*words, "--format", "html"]) == 0
    svg = (tmp_path / "out" / "fig10_hyperparameters.svg").read_text(encoding="utf-8")
    assert "n=32" in svg and "n=2000" in svg and "cifar10_tiny, W4A8, 1 seed" in svg
    assert (tmp_path / "out" / "fig10_hyperparameters.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in (tmp_path / "out" / "fig10_hyperparameters.html").read_text(encoding="utf-8")


def test_a_figure_shows_the_seeds_that_it_asks_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables ask for more seeds of some of its points."""
    usual = next(row for row in load("fig10_hyperparameters").rows if row.point == {"tdac": 1.2, "fbr": 0})
    save([*grid_runs(), run_of(usual, 1, {"sqnr": metric(90.0, higher=True, n=32, interval=[89.0, 91.0])})], tmp_path)
    drawn = []
    monkeypatch.setattr(paper_figures, "_lambda_panel", lambda axes, line, name: drawn.append(line))
    shown(capsys, "fig10_hyperparameters", "--results", str(tmp_path), "--out", str(tmp_path / "out"))
    assert {run.seed for line in drawn for _, runs in line for run in runs} == {0}
    text = (tmp_path / "out" / "fig10_hyperparameters.md").read_text(encoding="utf-8")
    assert "1 of 1" in text and "2 of 1" not in text


def test_a_figure_without_runs_says_how_to_make_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "fig10_hyperparameters", "--results", str(tmp_path))
    assert "- Nothing has run yet: `python run.py -m experiments=fig10_hyperparameters`" in text


def test_a_run_without_its_diagnostic_is_named_with_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save([run_of(load("fig3_activation_range").rows[0])], tmp_path)
    text = shown(capsys, "fig3_activation_range", "--results", str(tmp_path))
    assert "- Not drawn (no record has the diagnostic activation_range" in text
    assert "`python run.py -m experiments=fig3_activation_range`" in text


def test_files_beside_a_record_are_found_from_anywhere(tmp_path: Path) -> None:
    run = run_of(ABLATION.rows[0], outputs={"grid": "grid.png"})
    save([run], tmp_path / "results" / "local")
    (found,) = read_located([tmp_path / "results"])
    assert found.outputs["grid"] == str(
        path_of(tmp_path / "results" / "local", run.task, run.hash).with_name("grid.png")
    )


def test_journals_and_files_of_any_name_are_no_trouble(tmp_path: Path) -> None:
    run = run_of(ABLATION.rows[0], outputs={"grid": "grid.png"})
    path = path_of(tmp_path, run.task, run.hash)
    save([run], tmp_path)
    path.rename(path.with_name("mine.json"))
    (tmp_path / ".runs").mkdir()
    (tmp_path / ".runs" / path.name).write_text("{}")
    (found,) = read_located([tmp_path])
    assert found.outputs["grid"] == str(path.with_name("grid.png"))


def test_sample_grids_are_put_below_each_other(tmp_path: Path) -> None:
    from PIL import Image

    from edadm.report.figure_registry import FIGURES

    Image.new("RGB", (40, 20), "red").save(tmp_path / "one.png")
    runs = [
        run_of(ABLATION.rows[0], outputs={"grid": str(tmp_path / "one.png")}),
        run_of(ABLATION.rows[1], outputs={"grid": str(tmp_path / "gone.png")}),
    ]
    drawn = [FIGURES[str(load(name).figure)](runs[:1], [], tmp_path) for name in names() if name.endswith("_samples")]
    assert [png.name for png, _ in drawn] == [
        "fig7_imagenet_samples.png", "fig8_coco_samples.png", "fig9_drawbench_samples.png"
    ]  # fmt: skip
    assert all(file.is_file() for files in drawn for file in files)
    with pytest.raises(EdadmError, match=r"record of edadm \(.*\) seed 0: pictures are not committed"):
        FIGURES["fig8"](runs, [], tmp_path)

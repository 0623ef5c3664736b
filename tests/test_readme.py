"""What the documents tell a reader to type, open or trust exists and works."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import baselines
from benchmarks import readme as benchmark_block
from edadm import config, records, results
from edadm.calibration.rows import RowSampler
from edadm.calibration.trajectories import Trajectories
from edadm.comparison import read_all_draws
from edadm.parts import build_part, identity
from edadm.report import __main__ as report
from edadm.report.page import with_block
from edadm.report.render import markdown
from edadm.report.table import tables
from edadm.sampling.noise import SELECTION, numpy_rng
from edadm.tasks import ddim_checkpoint
from experiments import demo_band
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
COMMANDS = sorted(
    {
        line.strip()
        for text in DOCUMENTS.values()
        for line in re.findall(r"^python .*$", text, re.M) + re.findall(r"`(python [^`\n]*)`", text)
    }
)
RUNS = [command for command in COMMANDS if command.startswith("python run.py")]
TOOLS = {"edadm.report": report._parser, "edadm.results": results._parser}
PATHS = r"(?:edadm|baselines|conf|docs|tests|experiments|results)/[\w./-]*\w|[A-Z][A-Z_a-z]+\.(?:md|cff)|run\.py"
REFERENCES = sorted(
    {(document, path) for document, text in DOCUMENTS.items() for path in re.findall(rf"`({PATHS})(?:::[^`]*)?`", text)}
)
LINKS = sorted(
    {
        (document, path)
        for document, text in DOCUMENTS.items()
        for path in re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    }
)
GUARDS = sorted({guard for text in DOCUMENTS.values() for guard in re.findall(r"`(tests/[\w/]+\.py::\w+)`", text)})


def example(path: str) -> str:
    """The code block that the README gives for a new file."""
    found = re.search(rf"`{re.escape(path)}`:\n\n```\w+\n(.*?)```", README, re.S)
    assert found, f"README.md shows no {path}"
    return found[1]


@pytest.fixture(scope="module")
def readme_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with our configuration and the README's method: one, so that what is composed of it is composed once."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(config.CONF, folder / "conf")
    (folder / "low_noise.py").write_text(example("baselines/low_noise.py"), encoding="utf-8")
    for name in ("conf/calibration/low_noise.yaml", "conf/method/low_noise.yaml"):
        (folder / name).write_text(example(name), encoding="utf-8")
    return folder


@pytest.fixture
def readme_method(readme_files: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A configuration and a package of baselines that hold the README's method besides ours."""
    monkeypatch.setattr(config, "CONF", readme_files / "conf")
    monkeypatch.setattr(baselines, "__path__", [*baselines.__path__, str(readme_files)])
    yield
    sys.modules.pop("baselines.low_noise", None)


def settings(*words: str) -> config.Settings:
    return config.settings(config.compose(words), words)


@pytest.mark.usefixtures("readme_method")
def test_the_method_of_the_readme_composes_and_selects_its_rows() -> None:
    values = settings("method=low_noise", "profile=demo")
    assert values.variant == {} and values["reconstruction.name"] == "block"
    part = build_part(values["calibration"])
    members = [name for name in (*RowSampler.__annotations__, *vars(RowSampler)) if not name.startswith("_")]
    assert all(hasattr(part, name) for name in members)
    assert identity(part) == {"part": "baselines.low_noise.LowNoise", "version": 1, "share": 0.5}
    trajectories = Trajectories(torch.rand(6, 32, 3, 4, 4), torch.arange(6).flip(0))
    rows, diagnostics = part.select(trajectories, 32, numpy_rng(SELECTION, 0))
    assert set(rows.step.tolist()) == {3, 4, 5} and sum(diagnostics["counts"]) == 32
    assert torch.equal(rows.x, trajectories.x[rows.step, torch.arange(32)])


@pytest.mark.usefixtures("readme_method")
def test_the_part_of_the_readme_is_a_variant_of_other_methods() -> None:
    assert settings("calibration=low_noise").variant == {"calibration": "low_noise"}


def test_the_checkpoint_of_the_readme_goes_into_a_network_of_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def load_checkpoint(model, path):
        raise Stop(sum(parameter.numel() for parameter in model.parameters()))

    monkeypatch.setattr(ddim_checkpoint, "load_checkpoint", load_checkpoint)
    (code,) = re.findall(r"```python\n(from diffusers import.*?)```", README, re.S)
    with torch.device("meta"), pytest.raises(Stop) as stopped:
        exec(code, {})
    assert stopped.value.args == (35_746_307,)  # the DDIM CIFAR-10 network


@pytest.mark.parametrize("command", RUNS, ids=lambda command: command.partition("#")[0].strip())
@pytest.mark.usefixtures("readme_method")
def test_every_run_in_the_documents_passes_the_checks(command: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word for word in shlex.split(command, comments=True)[2:] if not word.startswith("-")]
    for word in words:
        name, _, value = word.partition("=")
        if name in ("load", "images", "calibration_set"):
            Path(value).mkdir()
    axes = [_values(word) for word in words]
    for number in range(max(map(len, axes), default=1)):  # every value once, not every combination
        settings(*(axis[number % len(axis)] for axis in axes))


def _values(word: str) -> list[str]:
    name, _, value = word.partition("=")
    return [word] if value.startswith("[") else [f"{name}={item}" for item in value.split(",")]


@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in RUNS])
def test_every_tool_in_the_documents_takes_its_options(command: str) -> None:
    words = shlex.split(command, comments=True)
    assert words[1] == "-m"
    if words[2] in TOOLS:
        TOOLS[words[2]]().parse_args(words[3:])
    else:
        path = ROOT / words[2].replace(".", "/")
        assert words[2] == "pytest" or path.is_dir() or path.with_suffix(".py").is_file()


def test_every_file_that_is_named_exists() -> None:
    invented = ("baselines/low_noise.py", "conf/calibration/low_noise.yaml", "conf/method/low_noise.yaml")
    there = [path for _, path in REFERENCES if path in invented or path.startswith("results/local")]
    assert not [item for item in REFERENCES if item[1] not in there and not (ROOT / item[1]).exists()]


def test_every_link_leads_somewhere() -> None:
    assert not [(document, path) for document, path in LINKS if not ((ROOT / document).parent / path).exists()]


def test_every_test_that_is_named_exists() -> None:
    pairs = [guard.split("::") for guard in GUARDS]
    tests = {path: (ROOT / path).read_text(encoding="utf-8") for path, _ in pairs if (ROOT / path).is_file()}
    assert not [(path, name) for path, name in pairs if not re.search(rf"^def {name}\(", tests.get(path, ""), re.M)]


def test_every_method_has_a_card_and_a_row_in_the_readme() -> None:
    for name in set(config.options("method")) - {"fp"}:
        assert (ROOT / "docs" / "cards" / f"{name}.md").is_file()
        assert f"| `{name}` |" in README
    for name, slot in itertools.product(config.options("method"), ("calibration", "reconstruction")):
        row = next((line for line in README.splitlines() if line.startswith(f"| `{name}` |")), None)
        assert row is None or f"`{settings(f'method={name}')[f'{slot}.name']}`" in row


def test_the_benchmark_block_is_what_the_committed_records_render() -> None:
    """Else `python -m benchmarks.readme` writes it."""
    assert with_block(README, benchmark_block.BLOCK, benchmark_block.block()) == README


def table_of(text: str) -> dict[str, dict[str, str]]:
    """The cells of the first table of a page, by row and column."""
    first = next(table for table in text.split("\n\n") if table.lstrip().startswith("|"))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in first.strip().splitlines()]
    head, _, *rows = lines
    return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows}


REFERENCE_BLOCKS = re.findall(r"<!-- (reference records: (\w+)) -->", README)
assert REFERENCE_BLOCKS


@pytest.mark.parametrize(
    ("block", "results", "task"),
    [("demo output", "demo", "cifar10_tiny"), *((block, "reference", task) for block, task in REFERENCE_BLOCKS)],
)
def test_a_table_of_results_is_that_of_its_records(block: str, results: str, task: str) -> None:
    shown = table_of(README.split(f"<!-- {block} -->")[1].split(f"<!-- /{block} -->")[0])
    folder = ROOT / "results" / results
    of_task = [record for record in records.read_all([folder]) if record.task == task and not record.variant]
    made = table_of(markdown(tables(of_task, read_all_draws([folder]))))
    assert shown.keys() == made.keys()
    for row, cells in shown.items():
        assert {column: made[row][column] for column in cells} == cells, row


QUANTIZATION = re.compile(
    r"With `profile=reference`.*?took (\d+) min (\d+) s and ([\d.]+) GB\nof two idle cores \(`(.*?)`\)"
)


def test_the_cost_of_quantization_is_that_of_its_record() -> None:
    minutes, seconds, gigabytes, folder = QUANTIZATION.search(README).groups()
    (record,) = [made for made in records.read_all([ROOT / folder]) if made.method == "edadm"]
    assert record.profile == "reference"
    assert (int(minutes), int(seconds)) == divmod(round(record.quantization_seconds), 60)
    assert float(gigabytes) == round(record.quantization_peak_mib / 1024, 1)


def test_the_time_of_the_demo_is_that_of_its_records() -> None:
    found = re.search(
        r"stages of these records took (\d+) min (\d+) s, (\d+) min (\d+) s of it the 256 images",
        " ".join(README.split()),
    )
    minutes, seconds, of_images, rest = map(int, found.groups())
    stages = [
        (name, stage.seconds)
        for record in records.read_all([ROOT / "results" / "demo"])
        for name, stage in record.stages.items()
        if not stage.reused
    ]
    assert (minutes, seconds) == divmod(round(sum(spent for _, spent in stages)), 60)
    assert (of_images, rest) == divmod(round(sum(spent for name, spent in stages if name == "sampling")), 60)


def test_the_spread_of_the_demo_is_that_of_its_band() -> None:
    text = " ".join(README.split())
    values = demo_band.read(demo_band.BANDS / "demo.json").values
    for method in ("edadm", "qdiffusion", "rtn"):
        mean, deviation = re.search(rf"([\d.]+) ± ([\d.]+) for {method}\b", text).groups()
        of_seeds = values[method]["fd_tiny"]
        assert (mean, deviation) == (f"{statistics.mean(of_seeds):.2f}", f"{statistics.stdev(of_seeds):.2f}")
    (above,) = re.search(r"rtn is (\d+) deviations above full precision", text).groups()
    (fp,) = [record for record in records.read_all([ROOT / "results" / "demo"]) if record.is_fp]
    rtn = values["rtn"]["fd_tiny"]
    assert (
        int(above) <= (statistics.mean(rtn) - fp.metrics["fd_tiny"]["value"]) / statistics.stdev(rtn) < int(above) + 1
    )

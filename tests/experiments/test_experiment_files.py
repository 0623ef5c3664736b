"""Every experiment file composes at both scales, its superset holds its rows, and its rows are lines of the paper."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig

from edadm import cli, config
from edadm.errors import EdadmError
from edadm.report import paper
from edadm.report.experiment_file import SCALES, Experiment, load, missing_parts, names

EVERY = [(name, scale) for name in names() for scale in SCALES]
RUNNING = [(name, scale) for name, scale in EVERY if load(name).rows]


class Everything:
    """The names of a group in which every part is available."""

    def __contains__(self, name: object) -> bool:
        return True


def composed(*words: str) -> DictConfig:
    """What Hydra hands to the start of a sweep."""
    config.offer_experiments()
    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        return loader.load_configuration("config", list(words), run_mode=RunMode.MULTIRUN)


@pytest.fixture(scope="module", params=RUNNING, ids=lambda case: "-".join(case))
def running(request: pytest.FixtureRequest) -> tuple[Experiment, DictConfig]:
    """An experiment with rows and what Hydra composes of it; what is available is asked for when jobs are made."""
    name, scale = request.param
    return load(name, scale), composed(f"experiments={name}", f"scale={scale}")


def wanted(experiment: Experiment, available: bool = False) -> set[tuple[tuple[str, str], ...]]:
    """The runs that the rows of quantized models ask for (those that can be run today)."""
    return {
        (*sorted(row.run.items()), ("seed", str(seed)))
        for row in experiment.rows
        if not row.is_fp and not (available and missing_parts(row.words))
        for seed in row.seeds
    }


def runs(experiment: Experiment, jobs: Iterable[Sequence[str]]) -> list[tuple[tuple[str, str], ...]]:
    """The words of some jobs that rows are told apart by."""
    keys = {key for row in experiment.rows for key in row.run}
    given = [dict(word.split("=", 1) for word in job) for job in jobs]
    return [
        (*sorted((k, v) for k, v in job.items() if k in keys), ("seed", job["seed"]))
        for job in given
        if job["method"] != "fp"
    ]


@pytest.mark.parametrize(("name", "scale"), EVERY)
def test_every_row_is_a_line_of_the_printed_table(name: str, scale: str) -> None:
    experiment = load(name, scale)
    assert bool(experiment.table) is not bool(experiment.figure)
    if experiment.table:
        cells = paper.read(experiment.table)
        printed = [row.paper for row in experiment.rows if row.paper] + [line.paper for line in experiment.settings]
        found = [next(iter(paper.line_of(cells, columns).values())) for columns in printed]
        assert {(cell.row, cell.task) for cell in found} >= {
            (cell.row, cell.task)
            for cell in cells
            if cell.task != "CIFAR-10 DDIM calibration=5120" or cell.method != "FP"
        }


def test_the_superset_holds_every_row_and_the_rest_is_dropped(
    running: tuple[Experiment, DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "options", lambda group: Everything())
    experiment, configuration = running
    jobs = runs(experiment, cli.jobs_of(copy.deepcopy(configuration)))
    assert len(jobs) == len(set(jobs))
    assert {tuple((k, v) for k, v in job if k in _named(experiment, job)) for job in jobs} == wanted(experiment)


def _named(experiment: Experiment, job: Sequence[tuple[str, str]]) -> set[str]:
    """The keys of the row that a job is for, and its seed."""
    given = dict(job)
    (row, *_) = [row for row in experiment.rows if not row.is_fp and all(given.get(k) == v for k, v in row.run.items())]
    return {*row.run, "seed"}


def test_what_is_available_can_be_run_and_nothing_else_is(running: tuple[Experiment, DictConfig]) -> None:
    experiment, configuration = running
    able = wanted(experiment, available=True)
    if not able:
        with pytest.raises(EdadmError, match="not available yet: "):
            cli.jobs_of(copy.deepcopy(configuration))
        return
    assert len(cli.jobs_of(copy.deepcopy(configuration))) == len(able)


@pytest.mark.parametrize("name", names())
def test_without_m_an_experiment_is_a_sweep(name: str) -> None:
    config.offer_experiments()
    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        found = hydra.compose("config", [f"experiments={name}"], return_hydra_config=True)
    assert found.hydra.mode == RunMode.MULTIRUN


@pytest.mark.parametrize(
    ("name", "jobs"), [("table6_ablation", 12), ("fig10_hyperparameters", 10), ("fig3_activation_range", 1)]
)
def test_the_number_of_runs(name: str, jobs: int) -> None:
    assert len(cli.jobs_of(composed(f"experiments={name}"))) == jobs


@pytest.mark.parametrize(
    "name", ["table6_ablation", *(name for name in names() if load(name).tasks == ["cifar10_tiny"])]
)
def test_runs_of_the_embedded_task_compose_and_differ_from_their_method_in_their_words_only(name: str) -> None:
    jobs = cli.jobs_of(composed(f"experiments={name}"))
    for words in (jobs[0], jobs[-1]):
        found = config.settings(config.compose(words), words)
        assert found.variant.keys() <= {word.split("=")[0] for word in words}


def test_the_command_line_narrows_an_axis() -> None:
    jobs = cli.jobs_of(composed("experiments=table6_ablation", "calibration=tdac", "seed=1,2"))
    assert sorted(jobs) == [
        [
            "task=cifar10_ldm_tiny", "profile=reference", "method=edadm", "bits=w4a8", "calibration=tdac",
            f"reconstruction={reconstruction}", f"seed={seed}",
        ]
        for reconstruction in ("block", "fbr")
        for seed in (1, 2)
    ]  # fmt: skip


def test_an_axis_narrowed_to_no_row_is_refused_naming_it() -> None:
    with pytest.raises(EdadmError, match=r"no row of table6_ablation at scale=tiny asks for calibration=normal"):
        cli.jobs_of(composed("experiments=table6_ablation", "calibration=normal"))


def test_a_table_of_settings_runs_nothing() -> None:
    with pytest.raises(EdadmError, match=r"runs nothing: python -m edadm\.report table8_hyperparameters"):
        cli.jobs_of(composed("experiments=table8_hyperparameters"))


def test_two_experiments_at_once_are_refused() -> None:
    with pytest.raises(EdadmError, match="one experiment at a time"):
        cli.jobs_of(composed("experiments=table6_ablation,table10_hardware"))


def test_an_ordinary_sweep_keeps_all_its_jobs() -> None:
    assert len(cli.jobs_of(composed("method=rtn,edadm", "seed=0,1"))) == 4


def test_an_experiment_changes_no_run() -> None:
    words = ["method=edadm", "bits=w4a8", "calibration=random", "seed=1"]
    chosen = [*words, "experiments=table6_ablation", "scale=tiny"]
    plain, within = (config.settings(config.compose(line), line) for line in (words, chosen))
    assert within == plain


def test_available_keeps_what_is_there_once_and_names_what_is_not() -> None:
    assert config.available("method", ["edadm", "nope", "rtn", "edadm"]) == "edadm,rtn"
    with pytest.raises(EdadmError, match="not available yet: task one, task two"):
        config.available("task", ["one", "two"])

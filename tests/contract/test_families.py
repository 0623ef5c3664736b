"""What every method owes on every denoiser family: a new file in either place is tested by existing."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from edadm.keys import Run
from edadm.quant import io
from edadm.quant.calibrate import set_activation_ranges, set_weight_ranges
from edadm.quant.network import Bits, QuantModel
from edadm.quant.ranges import MinMax
from edadm.reconstruction.random import seeded
from edadm.reconstruction.reconstruct import reconstruct
from tests.contract.test_methods import METHODS
from tests.e2e.toy_task import prepare
from tests.toys import DENOISERS

ITERATIONS, ROWS, ROWS_PER_PASS = 2, 4, 3


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Without diffusers' warning about position numbers with a batch axis."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def words(method: str) -> tuple[str, ...]:
    return f"method={method}", f"profile.iterations={ITERATIONS}", "profile.batch=2"


@pytest.fixture(scope="session")
def distinct(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The methods that are first with their granularity and optimisation: others would repeat their runs."""
    first: dict[tuple[str, str], str] = {}
    for method in METHODS:
        run = prepare(toy_model, tmp_path_factory.getbasetemp() / "unused", *words(method))
        first.setdefault((str(run.settings["reconstruction.granularity"]), str(run.optimizer)), method)
    return set(first.values())


@pytest.mark.parametrize("name", DENOISERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_quantizes_every_family_and_saves_it(
    method: str, name: str, toy: Callable[..., Run], distinct: set[str], tmp_path: Path
) -> None:
    if method not in distinct:
        pytest.skip("the same reconstruction as another method")
    run = toy(*words(method))
    denoiser, plan = DENOISERS[name], run.plan
    network, inputs = QuantModel.wrap(denoiser.build(), Bits(4, 8), plan), denoiser.inputs(ROWS)
    full_precision = network(**inputs)[0].detach()
    set_weight_ranges(network, MinMax())

    def set_ranges() -> None:
        set_activation_ranges(network, MinMax(), [lambda: network(**inputs)])

    set_ranges()
    if run.optimizer is not None:
        reports, states = reconstruct_all(run, network, inputs, set_ranges)
        granularity = "layer" if run.settings["reconstruction.granularity"] == "layer" else "block"
        units = [unit.name for unit in network.units(granularity)]
        phases = [phase.name for phase in run.optimizer.phases()]
        assert [(report.phase, report.unit) for report in reports] == [(p, u) for p in phases for u in units]
        assert all(report.loss_before >= 0 and report.loss_after >= 0 for report in reports)
        assert set().union(*states) >= {site.name for site in network.sites() if site.kind == "matmul"}
    with torch.no_grad():
        found = network(**inputs)[0]
        assert torch.isfinite(found).all() and not torch.equal(found, full_precision)
        assert torch.equal(io.load(io.save(network, tmp_path))(**inputs)[0], found)


def reconstruct_all(
    run: Run, network: QuantModel, inputs: dict[str, torch.Tensor], set_ranges: Callable[[], None]
) -> tuple[list[Any], list[set[str]]]:
    """Reconstruct every unit; return the reports and, for each, the names of the sites whose state it changed."""
    states: list[set[str]] = []

    def keep(key: str, state: dict[str, torch.Tensor], report: Any) -> None:
        states.append({name.rpartition(".")[0] for name in state})

    assert run.optimizer is not None
    reports = reconstruct(
        network,
        list(inputs.values()),
        run.optimizer,
        run.settings["reconstruction.granularity"],
        seeded(0),
        set_activation_ranges=set_ranges,
        on_unit=keep,
        rows_per_pass=ROWS_PER_PASS,
        names=list(inputs),
    )
    return reports, states

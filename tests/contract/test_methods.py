"""What every method in ``conf/method`` owes: a new file there is tested by existing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from edadm import config, stages
from edadm.keys import Run
from edadm.quant import io
from tests.e2e.toy_task import prepare

METHODS = config.options("method")
WORDS = ("profile.iterations=2",)


class Killed(BaseException):
    """What a kill looks like from inside."""


@dataclass(frozen=True)
class Finished:
    """A quantization of a method, and what its network gave before it was saved."""

    run: Run
    result: stages.Result
    before: torch.Tensor


@pytest.fixture(scope="module", params=METHODS)
def finished(request: pytest.FixtureRequest, toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """What several tests look at is quantized once."""
    folder, seen, save = tmp_path_factory.mktemp("finished"), [], io.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDADM_CACHE", str(folder / "cache"))
        patch.setattr(
            io, "save", lambda network, *a, **k: (seen.append(prediction(network)), save(network, *a, **k))[1]
        )
        run = prepare(toy_model, folder / "results", f"method={request.param}", *WORDS)
        result = quantize(run)
    return Finished(run, result, seen[0])


def quantize(run: Run) -> stages.Result:
    return stages.quantized(run, stages.calibration(run, stages.trajectories(run)))


def prediction(network: torch.nn.Module) -> torch.Tensor:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network(x, torch.tensor([5, 700]), return_dict=False)[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_names_every_slot_and_has_a_description(method: str) -> None:
    path = config.CONF / "method" / f"{method}.yaml"
    lines = path.read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# ")
    for slot in config.SLOTS:
        assert any(f"override /{slot}:" in line for line in lines), slot


def test_a_method_quantizes_saves_and_reloads_to_the_bit(finished: Finished) -> None:
    assert torch.equal(finished.before, prediction(io.load(finished.result.folder)))
    full_precision = prediction(finished.run.task.denoiser())
    assert torch.equal(finished.before, full_precision) == finished.run.is_full_precision


def test_a_method_reports_every_site_with_its_bits(finished: Finished) -> None:
    run, sites = finished.run, finished.result.info["sites"]
    allowed = {run.bits.weight, run.bits.act, run.bits.softmax, 8, 32}
    layers = [m for m in run.task.denoiser().modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len([site for site in sites if site["kind"] == "weight"]) >= len(layers)
    assert {site["bits"] for site in sites} <= allowed
    assert all(site["role"] and site["unit"] for site in sites)


def test_a_method_gives_the_same_network_twice_and_after_a_kill(
    finished: Finished, toy: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = toy(f"method={finished.run.settings['method']}", *WORDS)  # with a cache of its own
    assert again.store.root != finished.run.store.root
    save, written = stages.atomic_file, 0

    def kill(path):
        nonlocal written
        written += 1
        if written == 4:
            raise Killed
        return save(path)

    monkeypatch.setattr(stages, "atomic_file", kill)
    if again.optimizer is not None:
        with pytest.raises(Killed):
            quantize(again)
    monkeypatch.setattr(stages, "atomic_file", save)
    assert torch.equal(prediction(io.load(quantize(again).folder)), finished.before)


def test_a_method_leaves_the_evaluation_to_the_task(finished: Finished, toy: Callable[..., Run]) -> None:
    assert finished.run.protocol == toy("method=rtn").protocol

"""What every method in ``conf/method`` owes: a new file there is tested by existing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from edadm import config, stages
from edadm.keys import Run
from edadm.quant import io

METHODS = config.options("method")


class Killed(BaseException):
    """What a kill looks like from inside."""


@pytest.fixture(params=METHODS)
def method_run(request: pytest.FixtureRequest, toy: Callable[..., Run]) -> Run:
    return toy(f"method={request.param}", "profile.iterations=2")


def quantize(run: Run) -> stages.Result:
    return stages.quantized(run, stages.calibration(run, stages.trajectories(run)))


def prediction(network: torch.nn.Module) -> torch.Tensor:
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return network(x, torch.tensor([5, 700]), return_dict=False)[0]


def test_a_method_names_every_slot_and_has_a_description(method_run: Run) -> None:
    path = config.CONF / "method" / f"{method_run.settings['method']}.yaml"
    lines = path.read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# ")
    for slot in config.SLOTS:
        assert any(f"override /{slot}:" in line for line in lines), slot


def test_a_method_quantizes_saves_and_reloads_to_the_bit(method_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    save = io.save
    monkeypatch.setattr(
        io, "save", lambda network, *a, **k: (seen.append(prediction(network)), save(network, *a, **k))[1]
    )
    result = quantize(method_run)
    assert torch.equal(seen[0], prediction(io.load(result.folder)))
    full_precision = prediction(method_run.task.denoiser())
    assert torch.equal(seen[0], full_precision) == method_run.is_full_precision


def test_a_method_reports_every_site_with_its_bits(method_run: Run) -> None:
    sites = quantize(method_run).info["sites"]
    allowed = {method_run.bits.weight, method_run.bits.act, method_run.bits.softmax, 8, 32}
    layers = [m for m in method_run.task.denoiser().modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len([site for site in sites if site["kind"] == "weight"]) >= len(layers)
    assert {site["bits"] for site in sites} <= allowed
    assert all(site["role"] and site["unit"] for site in sites)


def test_a_method_gives_the_same_network_twice_and_after_a_kill(
    method_run: Run, toy: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = prediction(io.load(quantize(method_run).folder))
    monkeypatch.setenv("EDADM_CACHE", str(tmp_path_factory.mktemp("other_cache")))
    again = toy(f"method={method_run.settings['method']}", "profile.iterations=2")
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
    assert torch.equal(prediction(io.load(quantize(again).folder)), first)


def test_a_method_leaves_the_evaluation_to_the_task(method_run: Run, toy: Callable[..., Run]) -> None:
    assert method_run.protocol == toy("method=rtn").protocol

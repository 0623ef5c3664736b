from __future__ import annotations

from collections.abc import Callable

import pytest

from edadm import estimate, experiment
from edadm.keys import Run
from tests.e2e.conftest import toy, toy_model

__all__ = ["toy", "toy_model"]


def test_the_announcement_names_every_stage_that_is_still_to_do(toy: Callable[..., Run]) -> None:
    run = toy("method=edadm")
    text = estimate.announcement(run, experiment.full_precision(run))
    for stage in ("trajectories", "quantized", "images", "sqnr", "fp images"):
        assert stage in text


def test_what_is_in_the_store_costs_nothing(toy: Callable[..., Run]) -> None:
    run = toy("method=rtn")
    experiment.execute(run)
    assert estimate.stage_seconds(run, 1.0) == {}
    assert "trajectories" not in estimate.stage_seconds(toy("method=edadm"), 1.0)


def test_more_work_costs_more(toy: Callable[..., Run]) -> None:
    def seconds(*words: str) -> float:
        return sum(estimate.stage_seconds(toy(*words), 1.0).values())

    assert seconds("method=rtn") < seconds("method=edadm", "reconstruction=block") < seconds("method=edadm")
    assert seconds("method=rtn") < seconds("method=rtn", "n_images=60")
    assert seconds("method=edadm", "preset=paper") < seconds("method=edadm", "preset=released")


def test_what_is_not_in_the_time_is_said(toy: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy("method=rtn")
    assert "on top" not in estimate.announcement(run, None)
    monkeypatch.setattr(estimate, "LARGE", ("ssim",))
    assert estimate.announcement(run, None).split("\n")[0].endswith("); metrics come on top")

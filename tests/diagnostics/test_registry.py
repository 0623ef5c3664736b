from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable

import pytest

from edadm import experiment, records
from edadm.diagnostics import registry
from edadm.diagnostics.files import diagnostic_path, read_diagnostics, write_diagnostic
from edadm.errors import EdadmError
from edadm.keys import Run
from edadm.report.figure_registry import FIGURES
from tests.conftest import ROOT

Toy = Callable[..., Run]
ALL = f"diagnostics=[{','.join(registry.DIAGNOSTICS)}]"


def test_an_unknown_name_lists_the_choices_before_anything_is_computed(toy: Toy) -> None:
    with pytest.raises(EdadmError, match=r"has no_such: choose from activation_range, .*soft_rounding"):
        toy("method=rtn", "diagnostics=[scores,no_such]")
    with pytest.raises(EdadmError, match="give a list"):
        toy("method=rtn", "diagnostics=scores")


def test_every_diagnostic_and_its_figure_are_in_the_document() -> None:
    text = (ROOT / "docs" / "diagnostics.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", text, re.M))
    assert set(rows) == set(registry.DIAGNOSTICS)
    assert set(rows.values()) <= set(FIGURES)


def test_asking_for_diagnostics_does_not_change_the_run(toy: Toy) -> None:
    plain, asked = toy("method=edadm"), toy("method=edadm", ALL)
    assert plain.hash == asked.hash
    assert plain.settings.variant == asked.settings.variant
    record = records.read(experiment.execute(toy("method=rtn")))
    assert "diagnostics" not in record.config


def test_every_diagnostic_is_made_beside_a_record_that_was_there(toy: Toy) -> None:
    run = toy("method=edadm")
    path = experiment.execute(run)
    text = path.read_text()
    experiment.execute(toy("method=edadm", ALL))
    assert path.read_text() == text
    found = {made.name: made for made in read_diagnostics([run.results])}
    assert set(found) == set(registry.DIAGNOSTICS)
    for made in found.values():
        assert made.run == run.hash and made.task == run.task.name
        assert made.provenance["libraries"]["torch"] and made.seconds > 0
        assert made.values["unit"] and all(isinstance(count, int) for count in made.values["n"].values())
    assert len(records.read_all([run.results])) == 2  # the run and its full-precision row


def test_what_is_there_is_not_measured_again_but_an_older_version_is(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy("method=edadm", "diagnostics=[soft_rounding]")
    experiment.execute(run)
    path = diagnostic_path(run.results, run.task.name, run.hash, "soft_rounding")
    first = path.read_text()
    experiment.execute(run)
    assert path.read_text() == first
    [made] = read_diagnostics([run.results])
    write_diagnostic(dataclasses.replace(made, version=0), run.results)
    experiment.execute(run)
    assert json.loads(path.read_text())["version"] == registry.DIAGNOSTICS["soft_rounding"].version


def test_what_does_not_apply_is_left_out_with_a_reason(toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
    run = toy("method=rtn", "diagnostics=[soft_rounding,reconstruction_loss]")
    with caplog.at_level(logging.WARNING):
        assert experiment.execute(run).is_file()
    assert "soft_rounding does not apply to rtn" in caplog.text and "nothing is reconstructed" in caplog.text
    assert read_diagnostics([run.results]) == []


def test_weights_in_floating_point_have_losses_but_no_rounding(toy: Toy) -> None:
    run = toy("method=edadm", "bits=w32a8", "diagnostics=[soft_rounding,reconstruction_loss]")
    experiment.execute(run)
    assert [made.name for made in read_diagnostics([run.results])] == ["reconstruction_loss"]


def test_full_precision_has_ranges_but_no_quantizers(toy: Toy) -> None:
    run = toy("method=fp", "diagnostics=[activation_range,scores]")
    experiment.execute(run)
    [made] = read_diagnostics([run.results])
    assert made.name == "activation_range"
    assert all(site["quantizer"] is None for site in made.values["sites"])

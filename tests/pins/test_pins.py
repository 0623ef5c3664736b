"""No part gives other numbers under the same version; every part that a configuration can name is pinned."""

from __future__ import annotations

import dataclasses

import pytest
from omegaconf import OmegaConf

from edadm import config
from edadm.metrics.registry import METRICS
from tests.calibration.test_rows import PINNED_STEPS
from tests.pins import __main__ as command
from tests.pins import file
from tests.pins.vectors import Pin, pins

PINS = pins()


@pytest.mark.parametrize("name", PINS)
def test_a_part_gives_the_numbers_of_its_version(name):
    kept = file.read()
    assert name in kept, f"{name} has no pin: run `python -m tests.pins`"
    raised = (
        f"{name} is at version {PINS[name].version}, its pin at {kept[name]['version']}: run `python -m tests.pins`"
    )
    assert PINS[name].version == kept[name]["version"], raised
    complaint = file.moved(name, PINS[name], kept[name])
    assert complaint is None, complaint


def test_no_pin_is_left_of_a_part_that_is_gone():
    assert file.read().keys() == PINS.keys()


def parts_of(group: str) -> set[str]:
    """The classes that the files of a configuration group name."""
    files = (OmegaConf.load(path) for path in sorted((config.CONF / group).glob("*.yaml")))
    return {part["_target_"].rpartition(".")[2] for part in files if "_target_" in part}


def test_every_part_of_the_configuration_is_pinned():
    told = {pin.raises for pin in PINS.values()}
    for name in parts_of("ranges") | parts_of("optimization"):
        assert any(f"`version` of {name} in" in text for text in told), f"{name} has no pin in tests/pins/vectors.py"
    assert {f"metric {name}" for name in METRICS} <= PINS.keys()
    assert parts_of("calibration") == {name.partition("(")[0] for name in PINNED_STEPS}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Pins of one part in a file of one's own."""

    def use(*values: float, version: int = 1) -> None:
        monkeypatch.setattr(command, "pins", lambda: {"part": Pin(version, "`version` of Part", lambda: values)})

    monkeypatch.setattr(file, "PATH", tmp_path / "pins.json")
    monkeypatch.setattr(command, "PATH", tmp_path / "pins.json")
    return use


def test_numbers_move_only_with_the_version(own, capsys):
    own(1.0, 2.0)
    assert command.main() == 0
    own(1.0, 2.0 + 1e-5)
    assert command.main() == 0 and file.read()["part"]["values"] == [1.0, 2.0]  # rounding is no change
    own(1.0, 2.1)
    assert command.main() == 1
    assert "number 1 is 2.1 and was 2: " in (said := capsys.readouterr().err) and "raise `version` of Part" in said
    own(1.0)
    assert command.main() == 1
    own(1.0, 2.1, version=2)
    assert command.main() == 0 and file.read()["part"] == {"version": 2, "values": [1.0, 2.1]}


def test_a_pin_without_its_part_is_dropped(own):
    own(1.0)
    file.write({"gone": {"version": 1, "values": [3.0]}})
    assert command.main() == 0 and list(file.read()) == ["part"]


def test_pins_are_data():
    assert all(isinstance(pin.version, int) for pin in PINS.values())
    assert all(kept["values"] for kept in file.read().values())
    assert {field.name for field in dataclasses.fields(Pin)} == {"version", "raises", "compute", "rel"}

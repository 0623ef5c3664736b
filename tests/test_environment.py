from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.metadata import version

import pytest

from edadm.environment import MISMATCH, check_torchvision
from edadm.errors import EdadmError


def fail_with(monkeypatch, error: Exception) -> None:
    def import_module(name: str):
        assert name == "torchvision"
        raise error

    monkeypatch.setattr(importlib, "import_module", import_module)


@pytest.mark.parametrize("sign", MISMATCH)
def test_a_foreign_torchvision_is_named_with_both_versions_and_the_remedy(monkeypatch, sign: str) -> None:
    fail_with(monkeypatch, RuntimeError(f"{sign}."))
    with pytest.raises(EdadmError) as caught:
        check_torchvision()
    message = str(caught.value)
    assert sign in message
    assert f"torch {version('torch')} " in message and f"torchvision {version('torchvision')} " in message
    assert f"{sys.executable} -m pip install --force-reinstall torch torchvision" in message


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), ModuleNotFoundError("No module named 'torchvision'")])
def test_other_failures_pass_through(monkeypatch, error: Exception) -> None:
    fail_with(monkeypatch, error)
    with pytest.raises(type(error), match=str(error)):
        check_torchvision()


def test_the_check_costs_no_import_of_torch() -> None:
    code = "import sys, edadm.environment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_installed_pair_fits() -> None:
    check_torchvision()

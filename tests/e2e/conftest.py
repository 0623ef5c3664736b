from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edadm.keys import Run
from tests.e2e.toy_task import prepare
from tests.toys import tiny_unet


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights of a toy denoiser."""
    folder = tmp_path_factory.mktemp("toy_model")
    tiny_unet().save_pretrained(folder)
    return folder


@pytest.fixture
def toy(toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Prepare a toy run from words of the command line, with a cache and a results folder of its own."""
    monkeypatch.setenv("EDADM_CACHE", str(tmp_path / "cache"))
    return lambda *more: prepare(toy_model, tmp_path / "results", *more)

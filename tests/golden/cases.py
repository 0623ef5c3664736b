"""Read the golden vectors: one folder per case with ``case.json`` and ``tensors.safetensors``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

COMMITTED = Path(__file__).parent / "data"
OPTIONAL = ("11_qdiffusion", "12_pipeline")  # golden README 1.1


def load(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the settings and the tensors of one case folder.

    Skips the test where the folder may be absent: an optional case, or one that is too large to be committed.
    """
    if not (folder / "case.json").is_file():
        if COMMITTED in folder.parents:
            pytest.skip(f"{folder.name} is not among the committed vectors: set EDADM_GOLDEN to the full set")
        if set(OPTIONAL) & set(folder.parts):
            pytest.skip(f"optional case {folder.name} is absent")
        pytest.fail(f"no case.json in {folder}: EDADM_GOLDEN must name the folder that holds eda_ddim/")
    return json.loads((folder / "case.json").read_text()), load_file(folder / "tensors.safetensors")


def assert_within(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, unit: float | torch.Tensor) -> None:
    """Check |actual - expected| <= tolerance * unit elementwise; both are compared flattened."""
    actual, expected = actual.detach().reshape(-1).double(), expected.reshape(-1).double()
    assert actual.shape == expected.shape
    unit = unit.reshape(-1).double() if isinstance(unit, torch.Tensor) else unit
    excess = (actual - expected).abs() - tolerance * unit
    assert not (excess > 0).any() and not actual.isnan().any(), f"off by {(actual - expected).abs().max():.3g}"


def assert_close(actual: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    """Check the elementwise relative difference; both are compared flattened."""
    assert_within(actual, expected, relative, expected.abs())


def assert_close_to_max(actual: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    """Check max |actual - expected| <= relative * max |expected|."""
    assert_within(actual, expected, relative, float(expected.abs().max()))

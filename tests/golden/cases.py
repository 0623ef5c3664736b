"""Read one case of the golden vectors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file


def load(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Return the settings (case.json) and the tensors of a case folder."""
    return json.loads((folder / "case.json").read_text()), load_file(folder / "tensors.safetensors")

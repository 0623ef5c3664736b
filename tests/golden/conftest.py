from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.golden.cases import load


@pytest.fixture(scope="session")
def mapping_case(golden: Path) -> dict:
    return load(golden / "eda_ddim" / "01_mapping")[0]


@pytest.fixture(scope="session")
def official_names(mapping_case: dict) -> dict[str, str]:
    """Official module name -> diffusers module name, for every module that has a weight."""
    pairs = ((m["official"], m["diffusers"]) for m in mapping_case["mapping"])
    return {o.removesuffix(".weight"): d.removesuffix(".weight") for o, d in pairs if o.endswith(".weight")}


@pytest.fixture
def golden_unet(golden: Path, mapping_case: dict) -> nn.Module:
    """The small official network as a diffusers UNet2DModel in float32."""
    from diffusers import UNet2DModel
    from safetensors.torch import load_file

    from edadm.tasks.ddim_checkpoint import convert, load_state

    model = UNet2DModel(**mapping_case["diffusers_config"]).eval()
    official = load_file(golden / "eda_ddim" / "01_mapping" / "weights.safetensors")
    state = convert({k: v.to(torch.float32) for k, v in official.items()}, len(mapping_case["network"]["ch_mult"]))
    return load_state(model, state, "golden weights")

"""Keys and shapes of the real checkpoints, on the meta device (golden README, ldm, 11)."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from edadm.quant.families.dit import FAMILY
from edadm.tasks import compvis_unet, dit_checkpoint, first_stage
from edadm.tasks.conversion import convert
from edadm.tasks.dit_checkpoint import DIT_XL_2_256, dit_config, dit_params
from edadm.tasks.first_stage import KL_F8, VQ_F4, first_stage_config, first_stage_params
from edadm.tasks.ldm_checkpoint import LDM_MODELS
from edadm.tasks.model_folder import ATTENTION_HEADS, empty_model
from tests.golden import ldm_cases

OURS = {
    "bedroom": LDM_MODELS["lsun_bedroom_ldm4"].unet,
    "church": LDM_MODELS["lsun_church_ldm8"].unet,
    "cin256": LDM_MODELS["imagenet_ldm4"].unet,
    "sd14": LDM_MODELS["sd14"].unet,
    "vq_f4": VQ_F4,
    "kl_f8": KL_F8,
    "dit_xl_2": DIT_XL_2_256,
}
FILES = sorted((ldm_cases.root() / "real_keys").glob("*.json"))


@pytest.fixture(params=FILES or [None], ids=lambda path: path.stem if path else "none")
def stored(request):
    if request.param is None:
        pytest.skip("real_keys is an extra that this set does not have")
    return json.loads(request.param.read_text())


def test_every_key_of_the_real_checkpoint_finds_its_place(stored):
    values, config = stored["original"]["params"], stored["diffusers"]["config"]
    if stored["diffusers"]["class"].startswith("UNet"):
        params = compvis_unet.unet_params(values)
        model = empty_model(*compvis_unet.unet_config(params))
        source_of = partial(compvis_unet.source_of, params=params)
        one_width_per_network = stored["diffusers"]["class"] == "UNet2DModel"
        assert model.config.get(ATTENTION_HEADS) == (values.get("num_heads") if one_width_per_network else None)
    elif stored["diffusers"]["class"] == "DiTTransformer2DModel":
        params, source_of = dit_params(values), dit_checkpoint.source_of
        model = empty_model(*dit_config(params))
    else:
        params = first_stage_params(values)
        model = empty_model(*first_stage_config(params, config["scaling_factor"]))
        source_of = partial(first_stage.source_of, params=params)
    ldm_cases.assert_config(stored["diffusers"], model)
    prefix = stored["checkpoint_prefix"]
    state = {k.removeprefix(prefix): torch.empty(shape, device="meta") for k, shape in stored["keys"].items()}
    positions = state.pop("pos_embed", None)
    assert set(convert(state, source_of, model, stored["case"])) == set(model.state_dict())
    assert sum(p.numel() for p in model.parameters()) == stored["diffusers_n_params"]
    if positions is not None:
        assert positions.shape == model.pos_embed.pos_embed.shape
        assert FAMILY.parameters(model) == stored["n_params"]
    if ours := OURS.get(stored["case"]):
        same_size = replace(ours, image_size=params.image_size) if stored["case"] == "sd14" else ours
        assert same_size == params

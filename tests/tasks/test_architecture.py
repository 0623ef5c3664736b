from __future__ import annotations

import pytest

from edadm.errors import EdadmError
from edadm.tasks.architecture import DDIM, DIT, FIRST_STAGE, LDM, describe, require
from tests.tasks import originals
from tests.toys import tiny_unet


def test_the_kinds_that_are_read_are_recognised():
    assert describe(originals.ldm_state()) == LDM
    assert describe(originals.dit_state()) == DIT
    assert describe(originals.first_stage_state(originals.VQ)) == FIRST_STAGE
    assert describe(originals.first_stage_state(originals.KL)) == FIRST_STAGE
    assert describe(["temb.dense.0.weight", "down.0.block.0.norm1.weight"]) == DDIM


def test_a_later_stable_diffusion_is_not_taken_for_the_first():
    second = {"model.diffusion_model.input_blocks.0.0.weight", "cond_stage_model.model.ln_final.weight"}
    assert describe(second) == "a Stable Diffusion 2 checkpoint"


def test_another_architecture_is_named():
    with pytest.raises(EdadmError, match=r"unet.pt is a diffusers UNet \(give the folder.*, not an original DiT"):
        require(DIT, tiny_unet().state_dict(), "unet.pt")


def test_an_unknown_one_is_described_by_its_keys():
    with pytest.raises(EdadmError, match=r"unknown kind \(its first keys are fc\.bias, fc\.weight\)"):
        require(LDM, ["fc.weight", "fc.bias"], "resnet.pt")

"""Say what kind of model a state dict belongs to, by keys that only this kind has."""

from __future__ import annotations

from collections.abc import Iterable

from edadm.errors import EdadmError

LDM = "a CompVis latent diffusion checkpoint (edadm.tasks.ldm_checkpoint)"
FIRST_STAGE = "a CompVis first stage (edadm.tasks.first_stage)"
DIT = "an original DiT checkpoint (edadm.tasks.dit_checkpoint)"
DDIM = "an original DDIM checkpoint (edadm.tasks.ddim_checkpoint)"

# the first kind whose keys are all there
_KINDS: dict[str, tuple[str, ...]] = {
    "a Stable Diffusion XL checkpoint": ("conditioner.embedders.0.transformer.text_model.final_layer_norm.weight",),
    "a Stable Diffusion 2 checkpoint": ("cond_stage_model.model.ln_final.weight",),
    "a ControlNet checkpoint": ("control_model.input_blocks.0.0.weight",),
    LDM: ("model.diffusion_model.input_blocks.0.0.weight",),
    FIRST_STAGE: ("encoder.down.0.block.0.norm1.weight", "quant_conv.weight"),
    DIT: ("x_embedder.proj.weight", "blocks.0.adaLN_modulation.1.weight"),
    DDIM: ("temb.dense.0.weight", "down.0.block.0.norm1.weight"),
    "a PixArt checkpoint": ("x_embedder.proj.weight", "blocks.0.scale_shift_table"),
    "a Stable Diffusion 3 checkpoint": ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",),
    "a Flux checkpoint": ("double_blocks.0.img_attn.qkv.weight",),
    "a UNet without its latent diffusion model, or an ADM model": ("input_blocks.0.0.weight", "out.2.weight"),
    "a diffusers UNet (give the folder it was saved to)": ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"),
    "a diffusers autoencoder (give the folder it was saved to)": ("encoder.down_blocks.0.resnets.0.conv1.weight",),
    "a diffusers transformer (give the folder it was saved to)": ("transformer_blocks.0.attn1.to_q.weight",),
}


def describe(keys: Iterable[str]) -> str:
    """Return what a checkpoint with these keys is, in words."""
    present = set(keys)
    for kind, markers in _KINDS.items():
        if present.issuperset(markers):
            return kind
    shown = ", ".join(sorted(present)[:4])
    return f"a checkpoint of an unknown kind (its first keys are {shown})"


def require(expected: str, keys: Iterable[str], source: str) -> None:
    """Raise EdadmError naming what the file ``source`` is, unless it is ``expected``."""
    found = describe(keys)
    if found != expected:
        raise EdadmError(f"{source} is {found}, not {expected}: give that file, or choose the task of this model")

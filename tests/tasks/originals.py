"""Small checkpoints under the original names, random weights."""

from __future__ import annotations

import torch

from edadm.sampling.schedule import exact_alphas_cumprod, exact_betas
from edadm.tasks import compvis_unet, dit_checkpoint, first_stage
from edadm.tasks.compvis_unet import UNetParams
from edadm.tasks.dit_checkpoint import DiTParams
from edadm.tasks.first_stage import FirstStageParams
from edadm.tasks.ldm_checkpoint import LdmParams
from edadm.tasks.model_folder import empty_model

UNET = UNetParams(
    image_size=8,
    in_channels=3,
    out_channels=3,
    model_channels=8,
    attention_resolutions=(2,),
    num_res_blocks=1,
    channel_mult=(1, 2),
    num_heads=2,
    use_spatial_transformer=True,
    context_dim=6,
    norm_groups=4,
)
VQ = FirstStageParams(
    embed_dim=3, z_channels=3, n_embed=10, ch=4, ch_mult=(1, 2), num_res_blocks=1, resolution=16, norm_groups=2
)
KL = FirstStageParams(embed_dim=4, z_channels=4, ch=4, ch_mult=(1, 2), num_res_blocks=1, resolution=16, norm_groups=2)
LDM = LdmParams(UNET, VQ, 0.0015, 0.0195, ema=True, scale_factor=None, n_classes=5)
DIT = DiTParams(input_size=8, patch_size=2, in_channels=4, hidden_size=16, depth=2, num_heads=2, num_classes=10)


def random_tensors(names_and_shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in names_and_shapes.items()}


def unet_state(params=UNET, seed=0):
    """Every tensor of a UNet with spatial transformers is copied, so its shape is that of the diffusers tensor."""
    model = empty_model(*compvis_unet.unet_config(params))
    shapes = {compvis_unet.source_of(name, params).key: t.shape for name, t in model.state_dict().items()}
    return random_tensors(shapes, seed)


def first_stage_state(params=VQ):
    """The middle attention has 1x1 convolutions in the original."""
    shapes = {}
    for name, tensor in empty_model(*first_stage.first_stage_config(params, 1.0)).state_dict().items():
        is_projection = ".attentions." in name and tensor.ndim == 2
        shapes[first_stage.source_of(name, params).key] = (*tensor.shape, 1, 1) if is_projection else tensor.shape
    return random_tensors(shapes)


def ldm_state(params=LDM):
    raw, ema = unet_state(params.unet), unet_state(params.unet, seed=1)
    schedule = ("scaled_linear", params.linear_start, params.linear_end, params.timesteps)
    return {
        **{f"model.diffusion_model.{key}": t for key, t in raw.items()},
        **{f"model_ema.diffusion_model{key.replace('.', '')}": t for key, t in ema.items()},
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7),
        **{f"first_stage_model.{key}": t for key, t in first_stage_state(params.first_stage).items()},
        "cond_stage_model.embedding.weight": torch.randn(params.n_classes, params.unet.context_dim),
        "betas": exact_betas(*schedule).float(),
        "alphas_cumprod": exact_alphas_cumprod(*schedule).float(),
        "scale_factor": torch.tensor(0.25),
    }


def dit_state(params=DIT):
    model = empty_model(*dit_checkpoint.dit_config(params))
    shapes = {}
    for name, tensor in model.state_dict().items():
        key = dit_checkpoint.source_of(name).key
        shapes[key] = (3 * tensor.shape[0], *tensor.shape[1:]) if ".qkv." in key else tensor.shape
    return {**random_tensors(shapes), "pos_embed": model.pos_embed.pos_embed.clone()}

"""Small denoisers that tests build from nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tiny_unet(seed: int = 0):
    """A UNet2DModel with every kind of layer of the embedded task: two levels, attention, resamplers, 8 x 8 images."""
    from diffusers import UNet2DModel

    torch.manual_seed(seed)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        norm_num_groups=4,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    ).eval()


def church_unet():
    """A UNet2DModel built like LDM-8 church: residual blocks that resample, scale and shift by time, patched heads."""
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    model = UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "AttnUpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
        attn_norm_num_groups=4,
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
        freq_shift=0,
    ).eval()
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.heads, module.scale = 2, (module.to_q.out_features / 2) ** -0.5
    return model


def conditional_unet(**changes):
    """A UNet2DConditionModel built like LDM-4 ImageNet: one head, projections by 1x1 convolutions, a context."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 1,
        "cross_attention_dim": 6,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**config | changes).eval()


def diffusion_transformer():
    """A DiTTransformer2DModel with 3 classes that predicts noise and variance, and the frequencies of the original."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=2,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=3,
        norm_eps=1e-6,
    ).eval()
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model


def pixart_transformer():
    """A PixArtTransformer2DModel with a projected caption."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=6,
        in_channels=2,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=12,
        sample_size=8,
        caption_channels=5,
    ).eval()


def sd3_transformer():
    """An SD3Transformer2DModel with normalised queries, a second attention, and a last block without context."""
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=2,
        num_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=6,
        caption_projection_dim=8,
        pooled_projection_dim=5,
        out_channels=2,
        pos_embed_max_size=6,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    ).eval()


def flux_transformer():
    """A FluxTransformer2DModel with one block of two streams, one of a single stream, and embedded guidance."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=1,
        joint_attention_dim=6,
        pooled_projection_dim=5,
        guidance_embeds=True,
        axes_dims_rope=(4, 2, 2),
    ).eval()


@dataclass(frozen=True)
class Denoiser:
    """A small denoiser and the shapes of one row of its inputs, by name; time counts to ``times``."""

    build: Callable[[], torch.nn.Module]
    shapes: dict[str, tuple[int, ...]]
    classes: int = 0
    times: float = 1000

    def inputs(self, rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Return inputs of so many rows, the sample first."""
        generator = torch.Generator().manual_seed(seed)
        found = {name: torch.randn(rows, *shape, generator=generator) for name, shape in self.shapes.items()}
        found["timestep"] = torch.rand(rows, generator=generator) * self.times
        if self.classes:
            found["class_labels"] = torch.arange(rows) % (self.classes + 1)  # the last is the null class
        if "encoder_attention_mask" in found:
            found["encoder_attention_mask"] = (
                (found["encoder_attention_mask"] > -0.5).float().index_fill_(1, torch.tensor(0), 1)
            )
        for name in ("img_ids", "txt_ids"):
            if name in found:
                found[name] = torch.arange(found[name][0].numel()).view(found[name].shape[1:]).expand_as(found[name])
        return found


TEXT = {"encoder_hidden_states": (4, 6)}
IDS = {"img_ids": (6, 3), "txt_ids": (4, 3)}
DENOISERS = {
    "unet2d": Denoiser(tiny_unet, {"sample": (3, 8, 8)}),
    "unet2d_church": Denoiser(church_unet, {"sample": (2, 8, 8)}),
    "unet2d_condition": Denoiser(conditional_unet, {"sample": (3, 8, 8), "encoder_hidden_states": (1, 6)}),
    "dit": Denoiser(diffusion_transformer, {"hidden_states": (2, 8, 8)}, classes=3),
    "pixart": Denoiser(
        pixart_transformer,
        {"hidden_states": (2, 8, 8), "encoder_hidden_states": (4, 5), "encoder_attention_mask": (4,)},
    ),
    "sd3": Denoiser(sd3_transformer, {"hidden_states": (2, 8, 8), "pooled_projections": (5,), **TEXT}),
    "flux": Denoiser(
        flux_transformer, {"hidden_states": (6, 4), "pooled_projections": (5,), "guidance": (), **TEXT, **IDS}, times=1
    ),
}


class CountLarge(TorchDispatchMode):
    """Counts the tensors of at least so many numbers that operations make; views are none."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.numbers, self.count = numbers, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {id_of(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        made = (tensor for tensor in tree_leaves(output) if isinstance(tensor, torch.Tensor))
        self.count += sum(tensor.numel() >= self.numbers and id_of(tensor) not in given for tensor in made)
        return output


def id_of(tensor: torch.Tensor) -> int:
    """Return what tensors that share their numbers have in common."""
    return tensor.untyped_storage().data_ptr()

"""Small denoisers that tests build from nothing."""

from __future__ import annotations

import torch


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

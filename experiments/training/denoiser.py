"""The denoiser of cifar10_tiny: noise prediction on pixels, 1000 steps, linear betas."""

from __future__ import annotations

from typing import Any

import torch

from edadm.tasks.base import load_unet2d
from edadm.tasks.cifar10 import load_cifar10
from experiments.training.data import Shuffled, to_unit_range
from experiments.training.diffusion import Diffusion
from experiments.training.loop import Options, adamw, draws, export_model, optimise, placed

CONFIG = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (32, 64, 128, 192),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "norm_num_groups": 16,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "act_fn": "silu",
}


def train(options: Options) -> None:
    """Train and, where a folder is given, export."""
    from diffusers import UNet2DModel

    batches = Shuffled(*load_cifar10("train"), options.batch, options.seed)
    own: Any = load_unet2d(options.init) if options.init else UNet2DModel(**CONFIG)
    model = placed(own, options.device).train()
    steps = int(options.epochs * batches.steps_per_epoch)
    training = adamw(model, options, steps, decay_steps=max(1, min(1500, steps // 4)))
    network, diffusion = training.network(options), Diffusion("linear", 1e-4, 0.02, options.device)

    def loss_of(step: int) -> torch.Tensor:
        x0 = to_unit_range(batches(step)[0], options.device).contiguous(memory_format=torch.channels_last)
        t, noise = diffusion.drawn(x0, draws(options, step))
        eps = network(diffusion.noised(x0, t, noise), t).sample
        return diffusion.noise_loss(eps, noise, t).mean()

    optimise(training, options, loss_of)
    if options.export:
        export_model(training.averaged, options.export)

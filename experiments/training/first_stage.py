"""The autoencoder of the embedded latent tasks: KL-f4, 32 x 32 images to latents of 4 x 8 x 8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edadm.metrics import tiny
from edadm.metrics.tiny_network import TinyResNet
from edadm.tasks.cifar10 import load_cifar10
from edadm.tasks.cifar10_latent import AUTOENCODER_PARAMS
from edadm.tasks.first_stage import first_stage_config
from edadm.tasks.model_folder import load_model
from experiments.training.data import Shuffled, to_unit_range
from experiments.training.latents import VAE, encode
from experiments.training.loop import Options, adamw, draws, export_facts, export_model, optimise, placed, rounded
from experiments.training.modules import fresh_model

FEATURE_WEIGHT = 0.25
EDGE_WEIGHT = 1.0
KL_WEIGHT = 1e-6  # as latent diffusion
MEASURED = 10_000  # images whose latents give the scaling factor


class Reconstruction(nn.Module):
    """An autoencoder as one call, so that it can be compiled."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae: Any = vae

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the images of noisy latents, and mean and logarithm of the variance of the latents' posterior."""
        posterior = self.vae.encode(x).latent_dist
        return self.vae.decode(posterior.mean + posterior.std * noise).sample, posterior.mean, posterior.logvar


def train(options: Options) -> None:
    """Train, measure the scaling factor of the latents and, where a folder is given, export ``vae/``."""
    images, labels = load_cifar10("train")
    batches = Shuffled(images, labels, options.batch, options.seed)
    config = first_stage_config(AUTOENCODER_PARAMS, scale_factor=1.0)
    vae: Any = load_model(options.init / VAE) if options.init else fresh_model(*config)
    model = placed(Reconstruction(vae), options.device).train()
    steps = int(options.epochs * batches.steps_per_epoch)
    training = adamw(model, options, steps, decay_steps=max(1, steps // 3))
    network, features = training.network(options), tiny.load_network(device=options.device).model
    side = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)

    def loss_of(step: int) -> Tensor:
        x = to_unit_range(batches(step)[0], options.device).contiguous(memory_format=torch.channels_last)
        shape = (len(x), vae.config.latent_channels, side, side)
        noise = torch.randn(shape, generator=draws(options, step), device=options.device)
        made, mean, log_variance = (part.float() for part in network(x, noise))
        return reconstruction_loss(made, x, features) + KL_WEIGHT * divergence(mean, log_variance)

    curve = optimise(training, options, loss_of)
    trained: Any = rounded(training.averaged.vae)
    trained.register_to_config(scaling_factor=1.0)
    factor = 1 / float(encode(trained, images[:MEASURED]).std())
    trained.register_to_config(scaling_factor=factor)
    print(f"scaling factor {factor:.5f}", flush=True)
    if options.export:
        export_model(trained, options.export / VAE)
        export_facts(options, training, curve, scaling_factor=factor)


def reconstruction_loss(made: Tensor, x: Tensor, features: TinyResNet) -> Tensor:
    """Return L1 of pixels and of edges, and the distance of early features, each a mean over the batch."""
    pixels = (made - x).abs().mean()
    edges = sum((made.diff(dim=axis) - x.diff(dim=axis)).abs().mean() for axis in (2, 3))
    near = sum((unit(a) - unit(b)).square().sum(1).mean() for a, b in zip(early(made, features), early(x, features)))
    return pixels + EDGE_WEIGHT * edges + FEATURE_WEIGHT * near


def early(x: Tensor, network: TinyResNet) -> tuple[Tensor, ...]:
    """Return the feature maps of the proxies' network that come before all that are scored."""
    first = network.stem(x)
    second = network.stage1[0](first)
    return first, second, network.stage1[1:](second)


def unit(features: Tensor) -> Tensor:
    """Scale the channels at every place to length one (Zhang et al. 2018, LPIPS)."""
    return nn.functional.normalize(features.float(), dim=1)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(posterior || standard normal) in nats, a mean over the batch."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum((1, 2, 3)).mean()

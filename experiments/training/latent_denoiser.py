"""The denoisers of the embedded latent tasks: LDM and DiT by class, and text to image.

All predict the noise of latents that were encoded once, with the condition dropped at times for guidance. Each has the
noise schedule of the model it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edadm.metrics.clip import LOCAL, load_network
from edadm.sampling.schedule import exact_alphas_cumprod
from edadm.tasks import text
from edadm.tasks.base import noise_prediction
from edadm.tasks.cifar10 import CLASSES, load_cifar10
from edadm.tasks.cifar10_latent import DIT_PARAMS, LDM_PARAMS, T2I_PARAMS
from edadm.tasks.compvis_unet import unet_config
from edadm.tasks.dit import load_transformer
from edadm.tasks.dit_checkpoint import dit_config
from edadm.tasks.ldm_checkpoint import ClassEmbedder, LdmParams, load_class_embedding
from edadm.tasks.model_folder import load_model
from experiments.training.captions import captions
from experiments.training.data import Order
from experiments.training.diffusion import Diffusion
from experiments.training.latents import encoded
from experiments.training.loop import (
    Options,
    Training,
    adamw,
    draws,
    export_facts,
    export_model,
    half,
    optimise,
    placed,
)
from experiments.training.modules import fresh_dit, fresh_unet
from experiments.training.text_encoder import write_text_encoder

NULL_SHARE = 0.1  # of the images that are shown without their condition
DIT_SCHEDULE = ("linear", 1e-4, 0.02)

Conditions = Callable[[Tensor, torch.Generator], Mapping[str, Tensor]]
"""From labels int64 (B,) and the generator of the step to the arguments of the network."""


class ClassConditional(nn.Module):
    """A UNet and the embedding of its class token, trained as one and called with labels."""

    def __init__(self, unet: nn.Module, embedder: ClassEmbedder):
        super().__init__()
        self.unet, self.embedder = unet, embedder

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Return the noise as a diffusers network does."""
        token = self.embedder(class_labels)
        return self.unet(x, timestep, encoder_hidden_states=token, return_dict=return_dict)


def train_ldm(options: Options) -> None:
    """Train a class-conditional UNet with one token a class; export ``unet/`` and ``ldm.safetensors``."""
    params, n_classes = LDM_PARAMS, len(CLASSES) + 1
    unet = load_model(options.init / "unet") if options.init else fresh_unet(*unet_config(params.unet))
    assert params.unet.context_dim is not None
    embedder = ClassEmbedder(n_classes, params.unet.context_dim)
    if options.init:
        embedder.load_state_dict({"embedding.weight": load_class_embedding(options.init, params)})
    training, curve = _train(options, ClassConditional(unet, embedder), labelled, _schedule(params))
    if options.export:
        model = training.averaged
        export_model(model.unet, options.export / "unet")
        products = exact_alphas_cumprod(*_schedule(params)).float()
        embedding = half(model.embedder.state_dict())["embedding.weight"]
        tensors = {"alphas_cumprod": products, "cond_stage_model.embedding.weight": embedding}
        save_file(tensors, options.export / "ldm.safetensors")
        export_facts(options, training, curve)


def train_dit(options: Options) -> None:
    """Train a DiT that predicts noise and variance; export ``transformer/``."""
    params = DIT_PARAMS
    model = load_transformer(options.init, params) if options.init else fresh_dit(*dit_config(params))
    training, curve = _train(options, model, labelled, DIT_SCHEDULE, learned_variance=params.learn_sigma)
    if options.export:
        export_model(training.averaged, options.export / "transformer")
        export_facts(options, training, curve)


def train_t2i(options: Options) -> None:
    """Train a UNet on captions encoded by the small CLIP's text tower; export ``unet/`` and the text encoder.

    The encoder is frozen and read as the task reads it, with the empty prompt as the null condition.
    """
    params = T2I_PARAMS
    small, folder = load_network(f"{LOCAL}{options.clip}", None), options.checkpoint.with_suffix(".text")
    write_text_encoder(small, options.clip, folder)
    encode = text.encoder_of_folder(folder)
    model = load_model(options.init / "unet") if options.init else fresh_unet(*unet_config(params.unet))
    training, curve = _train(options, model, captioned(encode, options.device), _schedule(params))
    if options.export:
        export_model(training.averaged, options.export / "unet")
        write_text_encoder(small, options.clip, options.export)
        export_facts(options, training, curve)


def labelled(labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Return labels, some of them the null class.

    DiT's own dropping of labels draws in every block anew and from the global generator, so it stays switched off.
    """
    return {"class_labels": labels.masked_fill(_dropped(len(labels), generator), len(CLASSES))}


def captioned(encode: text.Encode, device: torch.device) -> Conditions:
    """Return the conditions of random captions of the class, some of them empty."""
    texts = captions()
    hidden = torch.stack([encode(of_class) for of_class in texts]).to(device)
    null = encode([""]).to(device)

    def conditions(labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        dropped = _dropped(len(labels), generator)
        which = torch.randint(0, hidden.shape[1], (len(labels),), generator=generator, device=device)
        return {"encoder_hidden_states": torch.where(dropped[:, None, None], null, hidden[labels, which])}

    return conditions


def _dropped(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, device=generator.device) < NULL_SHARE


def _schedule(params: LdmParams) -> tuple[str, float, float]:
    return "scaled_linear", params.linear_start, params.linear_end


def _train(
    options: Options,
    model: nn.Module,
    conditions: Conditions,
    schedule: tuple[str, float, float],
    learned_variance: bool = False,
) -> tuple[Training, list[list[float]]]:
    """Train on the latents of the training images; return the training when it is over, and its loss curve."""
    images, labels = load_cifar10("train")
    latents = encoded(options.autoencoder, images, options.device)
    order = Order(len(images), options.batch, options.seed)
    del images
    model = placed(model, options.device).eval()  # without layers that differ in training
    steps = int(options.epochs * order.steps_per_epoch)
    training = adamw(model, options, steps, decay_steps=max(1, steps // 3))
    denoise, diffusion = noise_prediction(training.network(options)), Diffusion(*schedule, options.device)
    channels = latents.shape[2]

    def loss_of(step: int) -> Tensor:
        rows, flip = order(step)
        x0 = latents[torch.from_numpy(flip.astype(np.int64)), torch.from_numpy(rows)].contiguous(
            memory_format=torch.channels_last
        )
        generator = draws(options, step)
        t, noise = diffusion.drawn(x0, generator)
        x = diffusion.noised(x0, t, noise)
        condition = conditions(torch.from_numpy(labels[rows]).to(options.device), generator)
        output = denoise(x, t, **condition).float()
        loss = diffusion.noise_loss(output[:, :channels], noise, t)
        if learned_variance:
            loss = loss + diffusion.variance_loss(x0, x, t, output[:, :channels], output[:, channels:])
        return loss.mean()

    return training, optimise(training, options, loss_of)

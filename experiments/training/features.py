"""The feature network of the proxies: classes, and the deviation of the noise in an image."""

from __future__ import annotations

import json

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edadm.metrics.tiny_network import TinyResNet
from edadm.tasks.cifar10 import load_cifar10
from experiments.training.data import Shuffled, shifted, to_unit_range
from experiments.training.loop import FACTS, Options, Training, half, optimise, placed, running_average


def train(options: Options) -> None:
    """Train with SGD, one cycle, random shifts, flips and label smoothing; report the test accuracy.

    An eighth of the images is faded into noise whose deviation the network estimates.
    """
    batches = Shuffled(*load_cifar10("train"), options.batch, options.seed)
    model = TinyResNet()
    if options.init:
        model.load_state_dict(load_file(options.init))
    placed(model, options.device)
    average = running_average(model, options.ema, use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=options.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = int(options.epochs * batches.steps_per_epoch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, steps, pct_start=0.2, cycle_momentum=False)
    training = Training(model, average, optimizer, schedule, steps, largest_norm=10.0)
    network = training.network(options)

    def loss_of(step: int) -> torch.Tensor:
        images, y = batches(step)
        rng = np.random.default_rng((options.seed, 2, step))
        x = to_unit_range(shifted(images, rng), options.device)
        deviation = torch.zeros(len(x), device=options.device)
        if options.noise_weight:
            x, deviation = noised(x, rng)
        logits, estimate = network(x.contiguous(memory_format=torch.channels_last))
        target = torch.from_numpy(y).to(options.device)
        classes = nn.functional.cross_entropy(logits.float(), target, label_smoothing=0.1, reduction="none")
        clear = (deviation == 0).float()
        loss = (classes * clear).sum() / clear.sum().clamp(min=1)
        return loss + options.noise_weight * (estimate.float() - deviation).square().mean()

    model.train()
    training.averaged.train()
    curve = optimise(training, options, loss_of)
    trained = training.averaged.eval()
    accuracy = test_accuracy(trained, options.device)
    print(f"test accuracy {accuracy:.4f}", flush=True)
    if options.export:
        options.export.mkdir(parents=True, exist_ok=True)
        save_file(half(trained.state_dict()), options.export / "features.safetensors")
        facts = {"test_accuracy": accuracy, "epochs": options.epochs, "loss_curve": curve}
        (options.export / FACTS).write_text(json.dumps(facts) + "\n")


def noised(x: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Fade an eighth of the images (N, 3, 32, 32) in [-1, 1] into noise; return them and the noise's deviation (N,).

    The noise is Gaussian or uniform with a deviation up to 0.8; from 0.5 on nothing of the image is left.
    """
    n = len(x)
    chosen = torch.from_numpy(rng.random(n) < 0.125)
    deviation = torch.from_numpy(rng.random(n, dtype=np.float32) * 0.8 * chosen.numpy())
    gaussian = rng.standard_normal(x.shape, dtype=np.float32)
    uniform = (rng.random(x.shape, dtype=np.float32) * 2 - 1) * np.float32(3**0.5)
    noise = np.where(rng.random((n, 1, 1, 1)) < 0.5, gaussian, uniform)
    per_image = deviation.to(x.device)[:, None, None, None]
    left = (1 - per_image / 0.5).clamp(min=0)
    return (left * x + per_image * torch.from_numpy(noise).to(x)).clamp(-1, 1), deviation.to(x.device)


@torch.no_grad()
def test_accuracy(model: nn.Module, device: torch.device) -> float:
    """Return the share of test images that are given their class."""
    images, labels = load_cifar10("test")
    hits = 0
    for i in range(0, len(images), 500):
        logits, _ = model(to_unit_range(images[i : i + 500], device))
        hits += int((logits.argmax(1).cpu() == torch.from_numpy(labels[i : i + 500])).sum())
    return hits / len(images)

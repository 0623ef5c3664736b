"""Train the embedded assets of the task cifar10_tiny: the denoiser and the feature network of the proxies.

    EDADM_CIFAR10=<folder> python -m experiments.train_tiny features
    EDADM_CIFAR10=<folder> python -m experiments.train_tiny denoiser --init edadm/assets/cifar10_tiny --epochs 14

Checkpoints (model, EMA, optimizer, position) go to the cache, so a stopped training goes on where it stood.
``--export FOLDER`` writes the fp16-exact weights when the training ends or is interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from edadm.metrics.tiny_network import POOLED_FEATURES, TinyResNet
from edadm.store import cache_root
from edadm.tasks.base import load_unet2d
from edadm.tasks.cifar10 import load_cifar10

DENOISER_CONFIG = {
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("denoiser", "features"))
    parser.add_argument("--init", type=Path, help="continue from a diffusers folder, or from features.safetensors")
    parser.add_argument("--epochs", type=float, default=14, help="passes over the 50,000 images, in total")
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--lr", type=float, help="peak learning rate (denoiser 4e-4, features 0.12)")
    parser.add_argument("--ema", type=float, default=0.9995, help="denoiser: decay of the weight average")
    parser.add_argument("--noise-weight", type=float, default=4.0, help="features: weight of the noise estimate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default=None, help="name of the checkpoint in the cache")
    parser.add_argument("--export", type=Path, help="folder that receives the weights")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="autocast of the forward pass")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    checkpoint = cache_root() / "training" / f"{args.name or args.what}.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    (train_denoiser if args.what == "denoiser" else train_features)(args, device, checkpoint)


def to_unit_range(images: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(images).to(device).float().div_(127.5).sub_(1)


class Shuffled:
    """Minibatches without repetition within an epoch, a function of (seed, step) so that a training can resume."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, batch: int, seed: int):
        self.images, self.labels, self.batch, self.seed = images, labels, batch, seed
        self.steps_per_epoch = len(images) // batch
        self.epoch, self.order = -1, np.empty(0, np.int64)

    def __call__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.images))
        rows = self.order[position * self.batch : (position + 1) * self.batch]
        images = self.images[rows]
        flip = np.random.default_rng((self.seed, 1, step)).random(len(rows)) < 0.5
        images[flip] = images[flip, :, :, ::-1]
        return images, self.labels[rows]


def train_denoiser(args: argparse.Namespace, device: torch.device, checkpoint: Path) -> None:
    """Noise prediction, 1000 steps, linear betas, loss weight min(1, 5 / SNR) (Hang et al. 2023)."""
    from diffusers import UNet2DModel

    images, labels = load_cifar10("train")
    batches = Shuffled(images, labels, args.batch, args.seed)
    model = load_unet2d(args.init) if args.init else UNet2DModel(**DENOISER_CONFIG)
    model = model.to(device, memory_format=torch.channels_last).train()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(args.ema))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr or 4e-4, weight_decay=0.0)
    steps = int(args.epochs * batches.steps_per_epoch)
    decay_steps = max(1, min(1500, steps // 4))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / 200) * max(0.05, min(1.0, (steps - s) / decay_steps))
    )
    start, curve = resume(checkpoint, model, average, optimizer, schedule)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).float().to(device)
    weight = torch.clamp(5 * (1 - alpha_bar) / alpha_bar, max=1.0)
    network = torch.compile(model) if args.compile else model

    def loss_of(step: int) -> torch.Tensor:
        x0 = to_unit_range(batches(step)[0], device).contiguous(memory_format=torch.channels_last)
        generator = torch.Generator(device).manual_seed(args.seed * 1_000_003 + step)
        t = torch.randint(0, 1000, (len(x0),), generator=generator, device=device)
        noise = torch.randn(x0.shape, generator=generator, device=device)
        a = alpha_bar[t][:, None, None, None]
        eps = network(a.sqrt() * x0 + (1 - a).sqrt() * noise, t).sample.float()
        return ((eps - noise).square().mean((1, 2, 3)) * weight[t]).mean()

    run(args, device, checkpoint, steps, start, curve, loss_of, model, average, optimizer, schedule)
    if args.export:
        half = {k: v.half().contiguous() for k, v in average.module.state_dict().items()}
        args.export.mkdir(parents=True, exist_ok=True)
        save_file(half, args.export / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        model.save_config(args.export)


class Graded(nn.Module):
    """The classifier with a head that estimates the noise in an image, so that its features grow with the noise."""

    def __init__(self, network: TinyResNet):
        super().__init__()
        self.network, self.noise = network, nn.Linear(POOLED_FEATURES, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pooled, _, logits = self.network.features(x)
        return logits, self.noise(pooled)[:, 0]


def train_features(args: argparse.Namespace, device: torch.device, checkpoint: Path) -> None:
    """Classification with SGD, one cycle, random shifts, flips and label smoothing; reports the test accuracy.

    An eighth of the images is faded into noise whose deviation the network estimates: a classifier alone has no reason
    to place more noise farther away, and a distance in its features would not rank bad samples.
    """
    images, labels = load_cifar10("train")
    batches = Shuffled(images, labels, args.batch, args.seed)
    network = TinyResNet()
    if args.init:
        network.load_state_dict(load_file(args.init))
    model = Graded(network).to(device, memory_format=torch.channels_last)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.998), use_buffers=True)
    lr = args.lr or 0.12
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = int(args.epochs * batches.steps_per_epoch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.2, cycle_momentum=False)
    start, curve = resume(checkpoint, model, average, optimizer, schedule)
    compiled = torch.compile(model) if args.compile else model

    def loss_of(step: int) -> torch.Tensor:
        x, y = batches(step)
        rng = np.random.default_rng((args.seed, 2, step))
        x = to_unit_range(shifted(x, rng), device)
        deviation = torch.zeros(len(x), device=device)
        if args.noise_weight:
            x, deviation = noised(x, rng)
        logits, estimate = compiled(x.contiguous(memory_format=torch.channels_last))
        target = torch.from_numpy(y).to(device)
        classes = nn.functional.cross_entropy(logits.float(), target, label_smoothing=0.1, reduction="none")
        clear = (deviation == 0).float()
        loss = (classes * clear).sum() / clear.sum().clamp(min=1)
        return loss + args.noise_weight * (estimate.float() - deviation).square().mean()

    model.train()
    average.module.train()
    run(args, device, checkpoint, steps, start, curve, loss_of, model, average, optimizer, schedule)
    trained = average.module.eval().network
    accuracy = test_accuracy(trained, device)
    print(f"test accuracy {accuracy:.4f}", flush=True)
    if args.export:
        args.export.mkdir(parents=True, exist_ok=True)
        state = trained.state_dict()
        half = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in state.items()}
        save_file(half, args.export / "features.safetensors")
        facts = {"test_accuracy": accuracy, "epochs": args.epochs, "loss_curve": curve}
        (args.export / "training.json").write_text(json.dumps(facts) + "\n")


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


def shifted(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move each image of (N, 3, 32, 32) by up to 4 pixels, mirrored at the border."""
    padded = np.pad(images, ((0, 0), (0, 0), (4, 4), (4, 4)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (32, 32), axis=(2, 3))
    top, left = rng.integers(0, 9, (2, len(images)))
    return windows[np.arange(len(images)), :, top, left].copy()


@torch.no_grad()
def test_accuracy(model: nn.Module, device: torch.device) -> float:
    images, labels = load_cifar10("test")
    hits = 0
    for i in range(0, len(images), 500):
        logits = model(to_unit_range(images[i : i + 500], device))
        hits += int((logits.argmax(1).cpu() == torch.from_numpy(labels[i : i + 500])).sum())
    return hits / len(images)


def resume(checkpoint: Path, model, average, optimizer, schedule) -> tuple[int, list]:
    if not checkpoint.exists():
        return 0, []
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    for part, name in ((model, "model"), (average, "average"), (optimizer, "optimizer"), (schedule, "schedule")):
        part.load_state_dict(state[name])
    print(f"resumed {checkpoint} at step {state['step']}", flush=True)
    return state["step"], state["curve"]


def run(args, device, checkpoint, steps, start, curve, loss_of, model, average, optimizer, schedule) -> None:
    """Optimise from step ``start`` to ``steps``, logging every 100 steps and saving every 500."""
    began, total = time.time(), 0.0
    for step in range(start, steps):
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0 if args.what == "denoiser" else 10.0)
        if not math.isfinite(float(norm)):
            raise SystemExit(f"training diverged at step {step}: gradient norm {float(norm)}")
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
        total += float(loss.detach())
        if (step + 1) % 100 == 0:
            rate = (step + 1 - start) * args.batch / (time.time() - began)
            curve.append([step + 1, round(total / 100, 5)])
            print(f"{args.what} step {step + 1}/{steps} loss {total / 100:.4f} {rate:.0f} images/s", flush=True)
            total = 0.0
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save(checkpoint, step + 1, curve, model, average, optimizer, schedule)


def save(checkpoint: Path, step: int, curve: list, model, average, optimizer, schedule) -> None:
    partial = checkpoint.with_suffix(".partial")
    parts = {"model": model, "average": average, "optimizer": optimizer, "schedule": schedule}
    torch.save({"step": step, "curve": curve} | {name: part.state_dict() for name, part in parts.items()}, partial)
    partial.replace(checkpoint)


if __name__ == "__main__":
    main()

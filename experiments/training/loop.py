"""What all trainings share: options, the loop, checkpoints to go on from, and weights that are exact in float16."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

LOG_EVERY = 100  # steps
SAVE_EVERY = 500
WARM_UP = 200
WEIGHTS = "diffusion_pytorch_model.safetensors"
FACTS = "training.json"


@dataclass(frozen=True)
class Options:
    """The command line of one training, with the training's own numbers where it says nothing."""

    what: str
    epochs: float
    batch: int
    lr: float
    ema: float
    seed: int
    noise_weight: float
    precision: str
    compile: bool
    device: torch.device
    checkpoint: Path
    init: Path | None
    export: Path | None
    autoencoder: Path
    clip: Path


@dataclass(frozen=True)
class Training:
    """What one training optimises, and how.

    average: of the weights over the steps, which is what is exported. largest_norm: of the gradient, which is scaled
    down to it.
    """

    model: nn.Module
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    steps: int
    largest_norm: float = 1.0

    def network(self, options: Options) -> Any:
        """Return the model to call, compiled if the options say so."""
        return torch.compile(self.model) if options.compile else self.model

    @property
    def averaged(self) -> Any:
        """The model with averaged weights."""
        return self.average.module

    def parts(self) -> dict[str, Any]:
        """Return what a checkpoint holds, by its names there."""
        return {
            "model": self.model,
            "average": self.average,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
        }


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a model on the device, its convolutions with channels last, their faster layout."""
    return model.to(device).to(memory_format=torch.channels_last)


def adamw(model: nn.Module, options: Options, steps: int, decay_steps: int, weight_decay: float = 0.0) -> Training:
    """Return a training with AdamW, a warm-up, and a linear decay to a twentieth over the last ``decay_steps``."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=weight_decay)
    average = running_average(model, options.ema)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARM_UP) * max(0.05, min(1.0, (steps - step) / decay_steps))

    return Training(model, average, optimizer, LambdaLR(optimizer, rate), steps)


def running_average(model: nn.Module, decay: float, use_buffers: bool = False) -> AveragedModel:
    """Return the average of the weights over the steps: exponential, its decay growing from 2 / 11 to ``decay``.

    With the decay of a long training from the start, the first weights still weigh a tenth after two thousand steps.
    """

    def update(average: Any, current: Any, count: Tensor | int) -> None:
        seen = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + seen) / (10 + seen)))(average, current, seen)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=use_buffers)


def optimise(training: Training, options: Options, loss_of: Callable[[int], Tensor]) -> list[list[float]]:
    """Take the steps that the checkpoint lacks, and return the loss curve as [step, mean loss since the last entry].

    loss_of: from the number of a step to its loss, of this number only, so that a training can go on after a kill with
    the same bits. Ctrl-C ends it early; the weights of then are in the average, those of the last save in the
    checkpoint. Raises SystemExit when the gradient is not finite.
    """
    start, curve = resume(training, options.checkpoint)
    began, losses = time.time(), []
    try:
        for step in range(start, training.steps):
            losses.append(_take(training, options, loss_of, step))
            if (step + 1) % LOG_EVERY == 0:
                speed = (step + 1 - start) * options.batch / (time.time() - began)
                mean = sum(losses) / len(losses)  # after a resumption they are fewer
                curve.append([step + 1, round(mean, 5)])
                print(
                    f"{options.what} step {step + 1}/{training.steps} loss {mean:.4f} {speed:.0f} images/s", flush=True
                )
                losses = []
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == training.steps:
                save(training, options.checkpoint, step + 1, curve)
    except KeyboardInterrupt:
        print(f"interrupted: {options.checkpoint} has the last multiple of {SAVE_EVERY} steps", flush=True)
    return curve


def _take(training: Training, options: Options, loss_of: Callable[[int], Tensor], step: int) -> float:
    with torch.autocast(options.device.type, torch.bfloat16, enabled=options.precision == "bf16"):
        loss = loss_of(step)
    training.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = float(nn.utils.clip_grad_norm_(training.model.parameters(), training.largest_norm))
    if not math.isfinite(norm):
        raise SystemExit(f"training diverged at step {step}: gradient norm {norm}")
    training.optimizer.step()
    training.schedule.step()
    training.average.update_parameters(training.model)
    return float(loss.detach())


def resume(training: Training, checkpoint: Path) -> tuple[int, list[list[float]]]:
    """Return the step to go on from and the loss curve up to it, every part as it was then."""
    if not checkpoint.exists():
        return 0, []
    state = torch.load(checkpoint, weights_only=True, map_location="cpu")
    for name, part in training.parts().items():
        part.load_state_dict(state[name])
    print(f"resumed {checkpoint} at step {state['step']}", flush=True)
    return state["step"], state["curve"]


def save(training: Training, checkpoint: Path, step: int, curve: list[list[float]]) -> None:
    """Replace the checkpoint, in one move."""
    partial = checkpoint.with_suffix(".partial")
    parts = {name: part.state_dict() for name, part in training.parts().items()}
    torch.save({"step": step, "curve": curve} | parts, partial)
    partial.replace(checkpoint)


def draws(options: Options, step: int) -> torch.Generator:
    """Return the generator of a step on the device, a function of seed and step."""
    return torch.Generator(options.device).manual_seed(options.seed * 1_000_003 + step)


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return floating-point tensors in float16, on the CPU, and the others as they are."""
    return {key: (t.half() if t.is_floating_point() else t).cpu().contiguous() for key, t in state.items()}


@torch.no_grad()
def rounded(model: nn.Module) -> nn.Module:
    """Round the weights of a module to what float16 holds, and return it in evaluation mode."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(tensor.half())
    return model.eval()


def export_model(model: Any, folder: Path) -> None:
    """Write a diffusers module as ``save_pretrained`` does, in float16."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(half(model.state_dict()), folder / WEIGHTS, metadata={"format": "pt"})
    model.save_config(folder)


def export_facts(options: Options, training: Training, curve: list[list[float]], **facts: float) -> None:
    """Write how a training went beside its weights; the cards are written from it."""
    assert options.export is not None
    numbers = {
        "steps": int(training.average.n_averaged),  # fewer than planned after Ctrl-C
        "batch": options.batch,
        "lr": options.lr,
        "ema": options.ema,
        "seed": options.seed,
        "precision": options.precision,
    }
    folder, text = options.export, json.dumps(numbers | facts | {"loss_curve": curve})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FACTS).write_text(text + "\n", encoding="utf-8")

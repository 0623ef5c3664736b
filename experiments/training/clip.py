"""The small CLIP behind clip_tiny, of open_clip's classes, trained on images and the captions of their class."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edadm.metrics.clip import CONFIG, FILES
from edadm.tasks.cifar10 import load_cifar10
from experiments.training.captions import captions, words
from experiments.training.data import Shuffled, shifted
from experiments.training.loop import Options, adamw, draws, export_facts, half, optimise, rounded
from experiments.training.tokenizer import learn_merges, open_clip_tokenizer, write_vocabulary

MODEL: dict[str, Any] = {
    "embed_dim": 64,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 4, "layers": 4, "width": 80, "head_width": 20},
    "text_cfg": {"context_length": 16, "layers": 2, "width": 64, "heads": 4},
}
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)  # of CIFAR-10's pixels in [0, 1]
PREPROCESS = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
WEIGHT_DECAY = 0.05
LARGEST_SCALE = 100.0  # of the logits, as in CLIP


class Pairs(nn.Module):
    """A CLIP model as one call on images and tokens, so that it can be compiled."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model: Any = model

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the embeddings of images and of texts, of length one, and the scale of their products."""
        scale = self.model.logit_scale.exp().clamp(max=LARGEST_SCALE)
        embeddings = (self.model.encode_image(images), self.model.encode_text(tokens))
        return *(nn.functional.normalize(part.float(), dim=1) for part in embeddings), scale


def train(options: Options) -> None:
    """Train; report how many test images are nearest to the captions of their class; export the model."""
    import open_clip

    texts = captions()
    folder = options.export or options.checkpoint.parent
    vocabulary = write_vocabulary(learn_merges(words(texts)), folder)
    tokenizer = open_clip_tokenizer(vocabulary, MODEL["text_cfg"]["context_length"])
    architecture = MODEL | {"text_cfg": MODEL["text_cfg"] | {"vocab_size": tokenizer.vocab_size}}
    model = open_clip.CLIP(**architecture)
    if options.init:
        model.load_state_dict(load_file(options.init / FILES[0]))
    tokens = torch.stack([tokenizer(of_class) for of_class in texts])  # (classes, captions, context)
    batches = Shuffled(*load_cifar10("train"), options.batch, options.seed)
    steps = int(options.epochs * batches.steps_per_epoch)
    pairs = Pairs(model).to(options.device).train()
    training = adamw(pairs, options, steps, max(1, steps // 2), WEIGHT_DECAY)
    network = training.network(options)

    def loss_of(step: int) -> Tensor:
        images, labels = batches(step)
        x = normalised(shifted(images, np.random.default_rng((options.seed, 2, step))), options.device)
        target = torch.from_numpy(labels).to(options.device)
        which = torch.randint(0, tokens.shape[1], target.shape, generator=draws(options, step), device=options.device)
        seen, read, scale = network(x, tokens.to(options.device)[target, which])
        return contrastive_loss(seen, read, scale, target)

    curve = optimise(training, options, loss_of)
    trained: Any = rounded(training.averaged.model)
    accuracy = zero_shot_accuracy(trained, tokens.to(options.device), *load_cifar10("test"))
    print(f"zero-shot test accuracy {accuracy:.4f}", flush=True)
    if options.export:
        save_file(half(trained.state_dict()), options.export / FILES[0])
        config = {"model_cfg": architecture, "preprocess_cfg": PREPROCESS}
        (options.export / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        export_facts(options, training, curve, zero_shot_test_accuracy=accuracy)


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, labels: Tensor) -> Tensor:
    """Return the loss of a batch in which every pair of equal class belongs together (Yang et al. 2022, UniCL).

    images, texts: (B, D) of length one. With ten classes, CLIP's own loss would push most equal pairs apart.
    """
    logits = scale * images @ texts.T
    same = (labels[:, None] == labels).float()
    wanted = same / same.sum(1, keepdim=True)  # symmetric, so both directions share it
    return (nn.functional.cross_entropy(logits, wanted) + nn.functional.cross_entropy(logits.T, wanted)) / 2


def normalised(images: np.ndarray, device: torch.device) -> Tensor:
    """Return bytes as CLIP's own transform gives them."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    return (torch.from_numpy(images).to(device).float().div_(255) - mean) / std


@torch.no_grad()
def zero_shot_accuracy(model: Any, tokens: Tensor, images: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of images that are nearest to the mean caption of their class.

    tokens: int64 (classes, captions, context).
    """
    means = [model.encode_text(of_class, normalize=True).mean(0) for of_class in tokens]
    classes = nn.functional.normalize(torch.stack(means), dim=1)
    hits = 0
    for start in range(0, len(images), 500):
        x = normalised(images[start : start + 500], tokens.device)
        found = (model.encode_image(x, normalize=True) @ classes.T).argmax(1).cpu()
        hits += int((found == torch.from_numpy(labels[start : start + 500])).sum())
    return hits / len(images)

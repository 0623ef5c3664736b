"""Measure the assets of the embedded latent tasks, their autoencoder and the small CLIP, and write their cards.

    EDADM_CIFAR10=<folder> python -m experiments.card_latent measure cifar10_autoencoder [--images 2000]
    EDADM_CIFAR10=<folder> python -m experiments.card_latent measure cifar10_clip_tiny
    python -m experiments.card_latent measure cifar10_ldm_tiny [--scales 1.5,2,3,5]
    python -m experiments.card_latent cards

``measure`` writes the record results/cards/<asset>.json and a grid of pictures beside the weights; a task is sampled at
full precision as run.py does it, and its scores at other guidance scales stand beside those at its own. ``cards`` makes
the README.md of each asset that is there, or writes the scores of its record into the one that it has.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edadm import config, experiment, stages
from edadm.keys import Run
from edadm.metrics import clip, clip_tiny, paired, tiny
from edadm.metrics.images import grid
from edadm.records import CARDS, provenance
from edadm.report.page import with_block
from edadm.sampling.noise import EVALUATION
from edadm.store import content_hash, file_sha256, write_atomically
from edadm.tasks import cifar10_latent
from edadm.tasks.cifar10 import CLASSES, load_cifar10
from edadm.tasks.latent import FirstStage
from edadm.tasks.model_folder import load_model
from experiments.card_text import ABOUT, AUTOENCODER, CLIP, card, scores_block
from experiments.training.captions import captions
from experiments.training.latents import encode
from experiments.training.loop import FACTS

SCHEMA = 1
RECORDS = Path(__file__).resolve().parents[1] / "results" / CARDS
BLOCK = "scores"
PER_CLASS = 8  # pictures in a row of a grid
NOT_OF_THE_WEIGHTS = ("README.md", "grid.png", FACTS)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_subparsers(dest="what", required=True)
    measuring = what.add_parser("measure")
    measuring.add_argument("asset", choices=ABOUT)
    measuring.add_argument("--images", type=int, default=2000)
    measuring.add_argument("--scales", default="", help="guidance scales besides the task's own, separated by commas")
    measuring.add_argument("--words", nargs="*", default=(), help="of a run.py command line")
    for part in (measuring, what.add_parser("cards")):
        part.add_argument("--records", type=Path, default=RECORDS, help="folder of the records (default: %(default)s)")
    args = parser.parse_args(words)
    if args.what == "cards":
        write_cards(args.records)
        return
    if args.asset == AUTOENCODER:
        found = measure_autoencoder(args.images)
    elif args.asset == CLIP:
        found = measure_clip(args.images)
    else:
        scales = [float(scale) for scale in args.scales.split(",") if scale]
        found = measure_task(args.asset, args.images, scales, args.words)
    facts = {"schema": SCHEMA, "asset": args.asset, "weights": identity(folder_of(args.asset))}
    text = json.dumps(facts | found | {"provenance": provenance("cpu")}, indent=1)
    print(f"{text}\nrecord: {write_atomically(args.records / f'{args.asset}.json', text + chr(10))}")


def folder_of(asset: str) -> Path:
    """Return the folder of an embedded asset."""
    return clip_tiny.FOLDER if asset == CLIP else cifar10_latent.ASSETS / asset


def identity(folder: Path) -> str:
    """Return a hash of the files of an asset that its scores depend on."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in NOT_OF_THE_WEIGHTS)
    return content_hash({path.relative_to(folder).as_posix(): file_sha256(path) for path in files})


def measure_task(task: str, n: int, scales: Sequence[float] = (), words: Sequence[str] = ()) -> dict[str, Any]:
    """Sample and score full precision at the task's guidance scale and at others, and draw samples of every class."""
    own = float(config.compose([f"task={task}"]).sampler.guidance_scale)
    scores = {}
    for scale in (own, *(scale for scale in scales if scale != own)):
        line = [f"task={task}", "method=fp", f"n_images={n}", f"sampler.guidance_scale={scale:g}", *words]
        run = experiment.prepare(config.settings(config.compose(line), line))
        sampled = stages.images(run, None)
        found = stages.metrics(run, sampled, None, None).info["metrics"]
        scores[f"{scale:g}"] = {name: result["value"] for name, result in found.items() if result["value"] is not None}
        print(f"guidance scale {scale:g}: {scores[f'{scale:g}']}", flush=True)
        if scale == own:
            images = stages.read_images(sampled)
            grid(by_class(images, labels_of(run, n)), run.task.location() / "grid.png", columns=PER_CLASS)
            sampler, count = run.settings["sampler"], parameters(run.task.denoiser())
    return {
        "n": n,
        "parameters": count,
        "sampler": sampler["name"],
        "steps": sampler["steps"],
        "guidance_scale": own,
        "scores": scores,
    }


def labels_of(run: Run, n: int) -> list[int]:
    """Return the class of each of the first n images: of its label, or of its embedded prompt."""
    assert run.task.conditions is not None
    conditions: Any = run.task.conditions()
    if hasattr(conditions, "labels"):
        return conditions.labels(EVALUATION, run.settings["evaluation_seed"], range(n)).tolist()
    return [number % len(CLASSES) for number in range(n)]


def by_class(images: torch.Tensor, labels: Sequence[int]) -> torch.Tensor:
    """Return the first images of each class, class after class, equally many of each and at most PER_CLASS."""
    rows = [[i for i, label in enumerate(labels) if label == wanted] for wanted in range(len(CLASSES))]
    count = min(PER_CLASS, *(len(row) for row in rows))
    return images[[i for row in rows for i in row[:count]]]


def measure_autoencoder(n: int) -> dict[str, Any]:
    """Measure how well test images survive the autoencoder, and draw some above what it makes of them."""
    folder = folder_of(AUTOENCODER)
    pixels, _ = test_images(n)
    model: Any = load_model(folder / "vae")
    latents = encode(model, pixels)
    images, made = torch.from_numpy(pixels), FirstStage(lambda: model).on("cpu")(latents)
    pairs = [part[i : i + PER_CLASS] for i in range(0, 4 * PER_CLASS, PER_CLASS) for part in (images, made)]
    grid(torch.cat(pairs), folder / "grid.png", columns=PER_CLASS)
    network, reference = tiny.load_network(), tiny.load_reference()
    return {
        "n": len(images),
        "parameters": parameters(model),
        "scaling_factor": model.config.scaling_factor,
        "psnr": float(paired.psnr(images, made).mean()),
        "ssim": float(paired.ssim(images, made).mean()),
        "fd_tiny_of_reconstructions": tiny.fd_tiny(tiny.extract(made, network), reference),
        "fd_tiny_of_images": tiny.fd_tiny(tiny.extract(images, network), reference),
        "latent_deviation": float(latents.std()),
    }


def measure_clip(n: int) -> dict[str, Any]:
    """Score test images with captions of their own class and of the next one."""
    network, texts = clip_tiny.load_network(), captions()
    pixels, labels = test_images(n)
    images = clip.image_embeddings(torch.from_numpy(pixels), network)

    def mean_score(step: int) -> float:
        classes = (labels + step) % len(CLASSES)
        prompts = [texts[label][i % len(texts[label])] for i, label in enumerate(classes)]
        return float(clip.scores(images, clip.text_embeddings(prompts, network)).mean())

    facts = training_facts(folder_of(CLIP))
    return {
        "n": len(pixels),
        "parameters": parameters(network.model),
        "clip_tiny_of_own_class": mean_score(0),
        "clip_tiny_of_next_class": mean_score(1),
        "zero_shot_test_accuracy": facts["zero_shot_test_accuracy"],
    }


def test_images(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return test images and their labels, n of them at random."""
    pixels, labels = load_cifar10("test")
    chosen = np.random.default_rng(0).permutation(len(pixels))[:n]
    return pixels[chosen], labels[chosen]


def parameters(network: torch.nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in network.parameters())


def training_facts(folder: Path) -> Mapping[str, Any]:
    """Return what a training wrote beside its weights."""
    facts: Mapping[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return facts


def write_cards(records: Path) -> None:
    """Write the scores into the card of every asset that is there, and a card where there is none."""
    for asset in ABOUT:
        folder = folder_of(asset)
        if not (folder / FACTS).is_file():
            continue
        record = records / f"{asset}.json"
        found = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
        if found is not None and found["weights"] != identity(folder):
            found = None
        page = folder / "README.md"
        size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
        text = page.read_text(encoding="utf-8") if page.is_file() else card(asset, size, training_facts(folder), BLOCK)
        page.write_text(with_block(text, BLOCK, scores_block(asset, found)), encoding="utf-8")
        print(page)


if __name__ == "__main__":
    main()

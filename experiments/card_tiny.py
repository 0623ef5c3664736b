"""Build the reference statistics of the embedded proxies, and measure what the cards of the embedded assets say.

    EDADM_CIFAR10=<folder> python -m experiments.card_tiny reference
    EDADM_CIFAR10=<folder> python -m experiments.card_tiny measure [--images 2000]
    python -m experiments.card_tiny cards

``reference`` writes edadm/assets/cifar10_tiny_features/reference.safetensors from the 50,000 training images.
``measure`` samples the denoiser, writes the record results/cards/cifar10_tiny.json and a grid of 64 samples. ``cards``
writes the scores of that record into the cards; it says so there when the assets are other ones than it measured.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edadm.errors import EdadmError
from edadm.metrics import tiny
from edadm.metrics.images import grid
from edadm.records import CARDS, provenance
from edadm.report.page import with_block
from edadm.sampling.ddim import Sampler
from edadm.sampling.generate import generate
from edadm.sampling.noise import numpy_rng
from edadm.store import file_sha256, write_atomically
from edadm.tasks.base import load_unet2d, noise_prediction
from edadm.tasks.cifar10 import CLASSES, load_cifar10

SCHEMA = 1
ASSETS = Path(tiny.__file__).parents[1] / "assets"
DENOISER = ASSETS / "cifar10_tiny"
WEIGHTS = "diffusion_pytorch_model.safetensors"
RECORD = Path(__file__).resolve().parents[1] / "results" / CARDS / "cifar10_tiny.json"
BLOCK = "scores"
ACCURACY, CLASS_SHARE, OF_GAUSSIAN = 0.88, 0.02, 0.2  # what the assets are accepted by
MADE = "Made by `python -m experiments.card_tiny measure`,\nkept in `results/cards/cifar10_tiny.json`."
SAMPLER, SEED = Sampler("quad", 20), 1234
RUNGS = {
    "held_out": "held-out images",
    "jpeg_30": "JPEG quality 30",
    "blur": f"blur, {tiny.BLUR_RADIUS} pixels",
    "fp_samples": "samples of the full-precision denoiser",
    "pixel_gaussian": "per-pixel Gaussian of the training set",
    "uniform_noise": "uniform noise",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("reference", "measure", "cards"))
    parser.add_argument("--model", type=Path, default=DENOISER, help="folder of the denoiser")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--grid", type=Path, help="PNG that receives 64 samples (default: beside the denoiser)")
    parser.add_argument("--record", type=Path, default=RECORD, help="file of the record (default: %(default)s)")
    args = parser.parse_args()
    if args.what == "reference":
        reference()
    elif args.what == "cards":
        write_cards(read(args.record) if args.record.is_file() else None)
    else:
        result = measure(args.model, args.images, args.grid or args.model / "grid.png")
        text = json.dumps(result, indent=1)
        print(f"{text}\nrecord: {write_atomically(args.record, text + chr(10))}")


def reference() -> None:
    """Write the statistics of the training images in the embedded features."""
    images = torch.from_numpy(load_cifar10("train")[0])
    result = tiny.build_reference(images, tiny.load_network(), "CIFAR-10 training images, JPEG copy")
    tiny.save_reference(result, tiny.REFERENCE)
    print(f"wrote {tiny.REFERENCE}: {result.n} images")


def measure(model: Path, n: int, grid_path: Path) -> dict[str, Any]:
    """Return the scores of the full-precision samples, their classes and the sanity ladder at equal n."""
    network, statistics = tiny.load_network(), tiny.load_reference()
    held_out, labels = load_cifar10("test")
    began = time.time()
    denoise = noise_prediction(load_unet2d(model).eval())
    with torch.no_grad():
        images = generate(denoise, SAMPLER, n, shape=(3, 32, 32), seed=SEED)
    seconds = time.time() - began
    grid(images[:64], grid_path)
    features = tiny.extract(images, network)
    order = numpy_rng("ladder", 0).permutation(len(held_out))[:n]
    ladder = tiny.sanity_ladder(torch.from_numpy(held_out[order]), statistics, network, numpy_rng("ladder", 1), images)
    test = tiny.extract(torch.from_numpy(held_out), network)
    return {
        "schema": SCHEMA,
        "assets": identity(model),
        "n": n,
        "steps": SAMPLER.steps,
        "seed": SEED,
        "sampling_seconds": round(seconds, 1),
        "fd_tiny": tiny.fd_tiny(features, statistics),
        "sfd_tiny": tiny.sfd_tiny(features, statistics),
        "is_tiny": tiny.is_tiny(features),
        "class_shares": dict(zip(CLASSES, np.round(tiny.class_shares(features), 4).tolist(), strict=True)),
        "ladder_fd_tiny": ladder,
        "fp_over_gaussian": ladder["fp_samples"] / ladder["pixel_gaussian"],
        "classifier_test_accuracy": float((test.logits.argmax(1).numpy() == labels).mean()),
        "test_images": len(held_out),
        "provenance": provenance("cpu"),
    }


def identity(model: Path = DENOISER) -> dict[str, str]:
    """Return the sha256 of the files that the scores depend on."""
    files = {"denoiser": model / WEIGHTS, "features": tiny.WEIGHTS, "reference": tiny.REFERENCE}
    return {name: file_sha256(path) for name, path in files.items()}


def read(path: Path = RECORD) -> dict[str, Any]:
    """Return the record in a file. Raises EdadmError naming the file if it holds none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["schema"] > SCHEMA:
            raise ValueError(f"schema {found['schema']}, this version reads up to {SCHEMA}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EdadmError(f"{path} holds no record of the embedded assets: {error}") from error
    return found


def write_cards(found: dict[str, Any] | None) -> None:
    """Write the scores of a record into the cards of the assets that it measured."""
    for folder, text in blocks(found).items():
        card = folder / "README.md"
        card.write_text(with_block(card.read_text(encoding="utf-8"), BLOCK, text), encoding="utf-8")


def blocks(found: dict[str, Any] | None) -> dict[Path, str]:
    """Return the text of the scores for the card in each folder; None or a record of other assets has none."""
    if found is None or found["assets"] != identity():
        text = (
            "These files have no record yet: `EDADM_CIFAR10=... python -m experiments.card_tiny measure`, then\n"
            "`python -m experiments.card_tiny cards`, write it and the scores.\n"
        )
        return dict.fromkeys((DENOISER, tiny.ASSETS), text)
    return {DENOISER: _denoiser(found), tiny.ASSETS: _features(found)}


def _denoiser(found: dict[str, Any]) -> str:
    shares = found["class_shares"]
    classes = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
    rows = {
        "fd_tiny": f"{found['fd_tiny']:.3f}",
        "sfd_tiny": f"{found['sfd_tiny']:.3f}",
        "is_tiny": f"{found['is_tiny']:.3f}",
        "fd_tiny as a share of a per-pixel Gaussian's": _judged(
            f"{found['fp_over_gaussian']:.3f}", f"below {OF_GAUSSIAN}", found["fp_over_gaussian"] < OF_GAUSSIAN
        ),
        "predicted classes": _judged(
            classes, f"from {100 * CLASS_SHARE:.0f} % each", min(shares.values()) >= CLASS_SHARE
        ),
    }
    return (
        f"{found['n']:,} samples, {found['steps']} steps, against the training statistics of\n"
        f"[cifar10_tiny_features](../cifar10_tiny_features). {MADE}\n\n{_table(('', ''), rows)}"
    )


def _features(found: dict[str, Any]) -> str:
    accuracy, ladder = found["classifier_test_accuracy"], found["ladder_fd_tiny"]
    judged = _judged(f"{100 * accuracy:.1f} %", f"from {100 * ACCURACY:.0f} %", accuracy >= ACCURACY)
    values = list(ladder.values())
    grows = "grows" if values == sorted(values) else "**does not grow**"
    rungs = {RUNGS[name]: f"{value:.3f}" for name, value in ladder.items()}
    return (
        f"Test accuracy on the {found['test_images']:,} JPEG test images: {judged}.\n\n"
        f"Sanity ladder, fd_tiny of {found['n']:,} images each against the training statistics, which must grow and\n"
        f"{grows}:\n\n{_table(('images', 'fd_tiny'), rungs)}\n{MADE}\n"
    )


def _judged(value: str, accepted: str, holds: bool) -> str:
    return f"{value} (accepted {accepted}{'' if holds else ': **not reached**'})"


def _table(head: tuple[str, str], rows: dict[str, str]) -> str:
    lines = [f"| {head[0]} | {head[1]} |".replace("|  |  |", "| | |"), "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())]) + "\n"


if __name__ == "__main__":
    main()

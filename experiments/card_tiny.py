"""Build the reference statistics of the embedded proxies and measure what the cards of the embedded assets say.

    EDADM_CIFAR10=<folder> python -m experiments.card_tiny reference
    EDADM_CIFAR10=<folder> python -m experiments.card_tiny measure [--images 2000]

``reference`` writes edadm/assets/cifar10_tiny_features/reference.safetensors from the 50,000 training images.
``measure`` samples the denoiser, prints acceptance figures as JSON and writes a grid of 64 samples.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from edadm.metrics import tiny
from edadm.metrics.images import grid
from edadm.sampling.ddim import Sampler
from edadm.sampling.generate import generate
from edadm.sampling.noise import numpy_rng
from edadm.tasks.base import load_unet2d, noise_prediction
from edadm.tasks.cifar10 import CLASSES, load_cifar10

ASSETS = Path(tiny.__file__).parents[1] / "assets"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("reference", "measure"))
    parser.add_argument("--model", type=Path, default=ASSETS / "cifar10_tiny", help="folder of the denoiser")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--grid", type=Path, help="PNG that receives 64 samples (default: beside the denoiser)")
    args = parser.parse_args()
    reference() if args.what == "reference" else measure(args.model, args.images, args.grid or args.model / "grid.png")


def reference() -> None:
    """Write the statistics of the training images in the embedded features."""
    images = torch.from_numpy(load_cifar10("train")[0])
    result = tiny.build_reference(images, tiny.load_network(), "CIFAR-10 training images, JPEG copy")
    tiny.save_reference(result, tiny.REFERENCE)
    print(f"wrote {tiny.REFERENCE}: {result.n} images")


def measure(model: Path, n: int, grid_path: Path) -> None:
    """Print the scores of the full-precision samples, their classes and the sanity ladder at equal n."""
    network, statistics = tiny.load_network(), tiny.load_reference()
    began = time.time()
    denoise = noise_prediction(load_unet2d(model).eval())
    with torch.no_grad():
        images = generate(denoise, Sampler("quad", 20), n, shape=(3, 32, 32), seed=1234)
    seconds = time.time() - began
    grid(images[:64], grid_path)
    features = tiny.extract(images, network)
    held_out, labels = load_cifar10("test")
    order = numpy_rng("ladder", 0).permutation(len(held_out))[:n]
    ladder = tiny.sanity_ladder(torch.from_numpy(held_out[order]), statistics, network, numpy_rng("ladder", 1), images)
    test = tiny.extract(torch.from_numpy(held_out), network)
    accuracy = float((test.logits.argmax(1).numpy() == labels).mean())
    result = {
        "n": n,
        "sampling_seconds": round(seconds, 1),
        "fd_tiny": tiny.fd_tiny(features, statistics),
        "sfd_tiny": tiny.sfd_tiny(features, statistics),
        "is_tiny": tiny.is_tiny(features),
        "class_shares": dict(zip(CLASSES, np.round(tiny.class_shares(features), 4).tolist(), strict=True)),
        "ladder_fd_tiny": ladder,
        "fp_over_gaussian": ladder["fp_samples"] / ladder["pixel_gaussian"],
        "classifier_test_accuracy": accuracy,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

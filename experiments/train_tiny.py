"""Train the networks of the embedded tasks and of their metrics.

    EDADM_CIFAR10=<folder> python -m experiments.train_tiny features
    EDADM_CIFAR10=<folder> python -m experiments.train_tiny denoiser --init edadm/assets/cifar10_tiny --epochs 14

and, in this order, those of the latent tasks, which read the ones before from edadm/assets:

    python -m experiments.train_tiny first_stage --export edadm/assets/cifar10_autoencoder
    python -m experiments.train_tiny clip --export edadm/assets/cifar10_clip_tiny
    python -m experiments.train_tiny ldm --export edadm/assets/cifar10_ldm_tiny
    python -m experiments.train_tiny dit --export edadm/assets/cifar10_dit_tiny
    python -m experiments.train_tiny t2i --export edadm/assets/cifar10_t2i_tiny

Checkpoints (model, EMA, optimizer, position) go to the cache, so a stopped training goes on where it stood.
``--export FOLDER`` writes the fp16-exact weights when the training ends or is interrupted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from edadm.errors import EdadmError
from edadm.store import cache_root
from edadm.tasks.cifar10_tiny import ASSETS
from experiments.training import clip, denoiser, features, first_stage, latent_denoiser
from experiments.training.loop import Options

TRAININGS: Mapping[str, Callable[[Options], None]] = {
    "denoiser": denoiser.train,
    "features": features.train,
    "first_stage": first_stage.train,
    "clip": clip.train,
    "ldm": latent_denoiser.train_ldm,
    "dit": latent_denoiser.train_dit,
    "t2i": latent_denoiser.train_t2i,
}
# epochs, batch, peak learning rate, decay of the weight average
NUMBERS: Mapping[str, tuple[float, int, float, float]] = {
    "denoiser": (14, 96, 4e-4, 0.9995),
    "features": (14, 96, 0.12, 0.998),
    "first_stage": (10, 64, 1e-3, 0.999),
    "clip": (24, 256, 1e-3, 0.999),
    "ldm": (40, 128, 1e-3, 0.9995),
    "dit": (25, 128, 1e-3, 0.9995),
    "t2i": (24, 128, 1e-3, 0.9995),
}


def main(words: Sequence[str] | None = None) -> None:
    args = parser().parse_args(words)
    epochs, batch, lr, ema = NUMBERS[args.what]
    torch.manual_seed(args.seed)
    checkpoint = cache_root() / "training" / f"{args.name or args.what}.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    options = Options(
        what=args.what,
        epochs=args.epochs or epochs,
        batch=args.batch or batch,
        lr=args.lr or lr,
        ema=args.ema or ema,
        seed=args.seed,
        noise_weight=args.noise_weight,
        precision=args.precision,
        compile=args.compile,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        checkpoint=checkpoint,
        init=args.init,
        export=args.export,
        autoencoder=args.autoencoder,
        clip=args.clip,
    )
    try:
        TRAININGS[args.what](options)
    except EdadmError as error:
        raise SystemExit(str(error)) from error


def parser() -> argparse.ArgumentParser:
    def own(position: int) -> str:
        return ", ".join(f"{what} {numbers[position]:g}" for what, numbers in NUMBERS.items())

    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("what", choices=TRAININGS)
    made.add_argument("--init", type=Path, help="continue from an exported folder, or from features.safetensors")
    made.add_argument("--epochs", type=float, help=f"passes over the 50,000 images, in total ({own(0)})")
    made.add_argument("--batch", type=int, help=f"images a step ({own(1)})")
    made.add_argument("--lr", type=float, help=f"peak learning rate ({own(2)})")
    made.add_argument("--ema", type=float, help=f"decay of the weight average ({own(3)})")
    made.add_argument("--noise-weight", type=float, default=4.0, help="features: weight of the noise estimate")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--name", help="name of the checkpoint in the cache (default: that of the training)")
    made.add_argument("--export", type=Path, help="folder that receives the weights")
    made.add_argument("--compile", action="store_true", help="torch.compile the network")
    made.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="autocast of the forward pass")
    made.add_argument(
        "--autoencoder", type=Path, default=ASSETS / "cifar10_autoencoder", help="ldm, dit, t2i: folder with vae/"
    )
    made.add_argument("--clip", type=Path, default=ASSETS / "cifar10_clip_tiny", help="t2i: folder of the small CLIP")
    return made


if __name__ == "__main__":
    main()

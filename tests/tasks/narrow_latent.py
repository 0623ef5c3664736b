"""The embedded latent tasks at a small width: the same structures, with random weights, in folders as exported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from edadm.metrics import clip
from edadm.tasks import cifar10_latent
from edadm.tasks.compvis_unet import unet_config
from edadm.tasks.dit_checkpoint import dit_config
from edadm.tasks.first_stage import first_stage_config
from experiments.training.captions import captions, words
from experiments.training.text_encoder import write_text_encoder
from experiments.training.tokenizer import learn_merges, open_clip_tokenizer, write_vocabulary
from tests.tasks.narrow import random_model

WIDTH = 8
AUTOENCODER = dataclasses.replace(cifar10_latent.AUTOENCODER_PARAMS, ch=4, norm_groups=2)


def _narrow(params):
    unet = dataclasses.replace(params.unet, model_channels=WIDTH, context_dim=WIDTH, norm_groups=4)
    return dataclasses.replace(params, unet=unet, first_stage=AUTOENCODER)


LDM = _narrow(cifar10_latent.LDM_PARAMS)
T2I = _narrow(cifar10_latent.T2I_PARAMS)
DIT = dataclasses.replace(cifar10_latent.DIT_PARAMS, hidden_size=WIDTH, depth=3, num_heads=2)
CLIP = {
    "embed_dim": 6,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 1, "width": WIDTH, "head_width": 4},
    "text_cfg": {"context_length": 16, "layers": 1, "width": WIDTH, "heads": 2},
}
PREPROCESS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3), "interpolation": "bicubic", "resize_mode": "shortest"}


def autoencoder_folder(folder: Path) -> Path:
    """A folder with ``vae/``, of 32 x 32 images and latents of 4 x 8 x 8."""
    random_model(*first_stage_config(AUTOENCODER, 0.5)).save_pretrained(folder / "vae")
    return folder


def clip_folder(folder: Path) -> Path:
    """A small CLIP with the vocabulary of the embedded prompts."""
    import open_clip

    vocabulary = write_vocabulary(learn_merges(words(captions())), folder)
    text = CLIP["text_cfg"] | {"vocab_size": open_clip_tokenizer(vocabulary, 16).vocab_size}
    config = CLIP | {"text_cfg": text}
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    state = {key: tensor + 0.1 * torch.randn(tensor.shape) for key, tensor in model.state_dict().items()}
    save_file({key: tensor.half().float() for key, tensor in state.items()}, folder / clip.FILES[0])
    (folder / clip.CONFIG).write_text(json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS}))
    return folder


def ldm_folder(folder: Path) -> Path:
    random_model(*unet_config(LDM.unet)).save_pretrained(folder / "unet")
    torch.manual_seed(0)
    tensors = {"cond_stage_model.embedding.weight": torch.randn(11, WIDTH), "alphas_cumprod": torch.rand(1000)}
    save_file(tensors, folder / "ldm.safetensors")
    return folder


def dit_folder(folder: Path) -> Path:
    random_model(*dit_config(DIT)).save_pretrained(folder / "transformer")
    return folder


def t2i_folder(folder: Path) -> Path:
    """Needs transformers."""
    random_model(*unet_config(T2I.unet)).save_pretrained(folder / "unet")
    small = clip_folder(folder.with_name("clip"))
    write_text_encoder(clip.load_network(f"{clip.LOCAL}{small}", None), small, folder)
    return folder


FOLDERS = {"cifar10_ldm_tiny": ldm_folder, "cifar10_dit_tiny": dit_folder, "cifar10_t2i_tiny": t2i_folder}

"""The paper's models at a small width, as checkpoints of the original layout and as the folders made of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch

from edadm.tasks.compvis_unet import CIN256_V2, LSUN_BEDROOM, LSUN_CHURCH, SD_V1, UNetParams, unet_config
from edadm.tasks.first_stage import KL_F8, VQ_F4, first_stage_config
from edadm.tasks.ldm_checkpoint import ClassEmbedder, LatentDiffusion, LdmParams, save_ldm
from edadm.tasks.model_folder import empty_model


def narrow(params: UNetParams, **changes) -> UNetParams:
    """The same levels, attention and switches at 8 base channels, 4 in a group."""
    head = {"num_head_channels": 4} if params.num_head_channels is not None and params.num_head_channels > 0 else {}
    return dataclasses.replace(params, model_channels=8, norm_groups=4, **head, **changes)


UNETS = {
    "lsun_bedroom_ldm4": narrow(LSUN_BEDROOM, image_size=8),
    "lsun_church_ldm8": narrow(LSUN_CHURCH, image_size=16),
    "imagenet_ldm4": narrow(CIN256_V2, image_size=8, context_dim=6),
    "sd14": narrow(SD_V1, image_size=8, context_dim=8),
}
FIRST_STAGES = {
    "vq": dataclasses.replace(VQ_F4, ch=4, n_embed=12, resolution=32, norm_groups=2),
    "kl": dataclasses.replace(KL_F8, ch=4, resolution=64, norm_groups=2),
}
LDMS = {
    "lsun_bedroom_ldm4": LdmParams(UNETS["lsun_bedroom_ldm4"], FIRST_STAGES["vq"], 0.0015, 0.0195, True, 1.0),
    "lsun_church_ldm8": LdmParams(UNETS["lsun_church_ldm8"], FIRST_STAGES["kl"], 0.0015, 0.0155, True, None),
    "imagenet_ldm4": LdmParams(UNETS["imagenet_ldm4"], FIRST_STAGES["vq"], 0.0015, 0.0195, False, 1.0, n_classes=4),
    "sd14": LdmParams(UNETS["sd14"], FIRST_STAGES["kl"], 0.00085, 0.012, False, 0.18215),
}
SHAPES = {
    "lsun_bedroom_ldm4": (3, 8, 8),
    "lsun_church_ldm8": (4, 16, 16),
    "imagenet_ldm4": (3, 8, 8),
    "sd14": (4, 8, 8),
}


@torch.no_grad()
def random_model(class_name: str, config: dict):
    """A module of a config with small random weights, its norms near one."""
    model = empty_model(class_name, config).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        centre = 1.0 if "norm" in name and name.endswith("weight") and parameter.dim() == 1 else 0.0
        fan = parameter[0].numel() if parameter.dim() > 1 else 16
        parameter.normal_(generator=generator).mul_(fan**-0.5).add_(centre)
    for name, buffer in empty_buffers(class_name, config):
        model.get_buffer(name).copy_(buffer)
    return model


def empty_buffers(class_name: str, config: dict):
    """Buffers that a module computes for itself."""
    made = empty_model(class_name, config)
    return [(name, buffer) for name, buffer in made.named_buffers() if not buffer.is_meta]


def ldm_folder(name: str, folder: Path) -> Path:
    """A folder as `save_ldm` writes it, of the named model at a small width."""
    params = LDMS[name]
    factor = 0.3 if params.scale_factor is None else params.scale_factor
    embedder = None if params.n_classes is None else ClassEmbedder(params.n_classes, params.unet.context_dim)
    model = LatentDiffusion(
        random_model(*unet_config(params.unet)),
        random_model(*first_stage_config(params.first_stage, factor)),
        torch.linspace(0.99, 0.01, 1000),
        factor,
        embedder,
    )
    save_ldm(model, folder)
    return folder


def dit_folder(folder: Path) -> Path:
    """A pipeline's folder with a DiT as on the hub: a class of early diffusers, its constants, and no fields of ours."""
    config = {
        "num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 4, "out_channels": 8, "num_layers": 2,
        "sample_size": 8, "num_embeds_ada_norm": 5, "norm_type": "ada_norm_zero", "norm_elementwise_affine": False,
        "activation_fn": "gelu-approximate", "attention_bias": True, "norm_eps": 1e-5, "patch_size": 2,
    }  # fmt: skip
    random_model("DiTTransformer2DModel", config).save_pretrained(folder / "transformer")
    file = folder / "transformer" / "config.json"
    saved = json.loads(file.read_text()) | {"_class_name": "Transformer2DModel"}
    file.write_text(json.dumps(saved))
    random_model(*first_stage_config(FIRST_STAGES["kl"], 0.18215)).save_pretrained(folder / "vae")
    return folder


TEXT = {
    "vocab_size": 40, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 7, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
}  # fmt: skip


def pipeline_folder(folder: Path) -> Path:
    """The folder of a Stable Diffusion pipeline, its autoencoder's attention named as on the hub; needs transformers."""
    from safetensors.torch import load_file, save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    ldm_folder("sd14", folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    early = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    state = load_file(file)
    for current, name in early.items():
        state = {key.replace(current, name): tensor for key, tensor in state.items()}
    save_file(state, file)
    torch.manual_seed(0)
    CLIPTextModel(CLIPTextConfig(**TEXT)).save_pretrained(folder / "text_encoder")
    tokens = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopq", *(f"{c}</w>" for c in "abcdefghijklmnopq")]
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    facts = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 7, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(facts))
    return folder

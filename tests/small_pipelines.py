"""Pipelines of diffusers with random weights, so narrow that an image takes milliseconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.toys import conditional_unet, tiny_unet

LETTERS = "abcdefghijklmnopq"
PROMPTS = [f"a {letter} b" for letter in LETTERS]
CONTEXT = 8  # tokens of a text


def clip_tokenizer(folder: Path) -> Any:
    """A tokenizer of CLIP over single letters."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    facts = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CONTEXT, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts))
    return CLIPTokenizer.from_pretrained(folder)


def clip_text(projection: bool = False, width: int = 8) -> Any:
    """A text encoder of CLIP, with the projection of its pooled output if asked."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=40, hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=width,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_tokenizer() -> Any:
    """A tokenizer of T5 over single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{letter}", -2.0) for letter in LETTERS)]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("▁", -3.0)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made = T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0, model_max_length=CONTEXT)
    return made


def t5_text(width: int = 12) -> Any:
    """A text encoder of T5."""
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(2)
    return T5EncoderModel(
        T5Config(
            vocab_size=24, d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2, feed_forward_proj="gated-gelu"
        )
    ).eval()


def autoencoder(channels: int = 4, **more: Any) -> Any:
    """An autoencoder whose latents are half as wide as its images."""
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    return AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels, norm_num_groups=2, sample_size=16, **more,
    ).eval()  # fmt: skip


def ddpm(folder: Path) -> Any:
    from diffusers import DDPMPipeline, DDPMScheduler

    return DDPMPipeline(tiny_unet(), DDPMScheduler(num_train_timesteps=100))


def ddim(folder: Path) -> Any:
    from diffusers import DDIMPipeline, DDIMScheduler

    return DDIMPipeline(tiny_unet(), DDIMScheduler())


def stable_diffusion(folder: Path) -> Any:
    from diffusers import PNDMScheduler, StableDiffusionPipeline

    unet = conditional_unet(
        in_channels=4, out_channels=4, cross_attention_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=2,
    )  # fmt: skip
    scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    return StableDiffusionPipeline(
        autoencoder(), clip_text(), clip_tokenizer(folder), unet, scheduler, None, None, requires_safety_checker=False
    )


def stable_diffusion_xl(folder: Path) -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    unet = conditional_unet(
        in_channels=4, out_channels=4, cross_attention_dim=16, attention_head_dim=(1, 2), addition_embed_type="text_time",
        addition_time_embed_dim=4, projection_class_embeddings_input_dim=32, use_linear_projection=True,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    )
    return StableDiffusionXLPipeline(
        autoencoder(), clip_text(), clip_text(projection=True), clip_tokenizer(folder), clip_tokenizer(folder), unet,
        scheduler, add_watermarker=False,
    )  # fmt: skip


def dit(folder: Path) -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    return DiTPipeline(transformer, autoencoder(), DDIMScheduler(clip_sample=False))


def pixart(folder: Path) -> Any:
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=6, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=12,
        sample_size=8, caption_channels=12,
    ).eval()  # fmt: skip
    return PixArtAlphaPipeline(t5_tokenizer(), t5_text(), autoencoder(), transformer, DPMSolverMultistepScheduler())


def stable_diffusion_3(folder: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=2, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=8, pooled_projection_dim=16, out_channels=4, pos_embed_max_size=8,
    ).eval()  # fmt: skip
    clips = clip_text(projection=True), clip_text(projection=True)
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), autoencoder(shift_factor=0.1, scaling_factor=1.5),
        clips[0], clip_tokenizer(folder), clips[1], clip_tokenizer(folder), t5_text(16), t5_tokenizer(),
    )  # fmt: skip


def flux(folder: Path) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=8, guidance_embeds=True, axes_dims_rope=(4, 2, 2),
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    vae = autoencoder(shift_factor=0.1, scaling_factor=1.5)
    return FluxPipeline(scheduler, vae, clip_text(), clip_tokenizer(folder), t5_text(), t5_tokenizer(), transformer)


PIPELINES: dict[str, Callable[[Path], Any]] = {
    made.__name__: made
    for made in (ddpm, ddim, stable_diffusion, stable_diffusion_xl, dit, pixart, stable_diffusion_3, flux)
}
TEXTS = ("stable_diffusion", "stable_diffusion_xl", "pixart", "stable_diffusion_3", "flux")

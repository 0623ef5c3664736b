"""Attention processors of diffusers whose products run through quantizers, and the check that none is left out."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from edadm.errors import EdadmError
from edadm.quant.layers import AttentionMatmul

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k and v, each (B, heads, N, d)


class QuantAttention:
    """Self- and cross-attention, in place of ``AttnProcessor`` and ``AttnProcessor2_0``."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        tokens = x.flatten(2).transpose(1, 2) if x.ndim == 4 else x  # (B, N, C)
        if attn.group_norm is not None:
            tokens = attn.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
        context = tokens if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        q, k, v = (
            linear(source).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, heads, N, d)
            for linear, source in ((attn.to_q, tokens), (attn.to_k, context), (attn.to_v, context))
        )
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(tokens))
            attention_mask = attention_mask.view(len(tokens), attn.heads, -1, attention_mask.shape[-1])
        out = attn.matmul(q, k, v, attention_mask).transpose(1, 2).flatten(2)  # (B, N, C)
        for layer in attn.to_out:
            out = layer(out)
        if hidden_states.ndim == 4:
            out = out.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor


class QuantJointAttention:
    """Image, then context tokens attend together, without a mask; in place of ``JointAttnProcessor2_0`` (SD3)."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q, k, v = _image_heads(attn, hidden_states)
        if encoder_hidden_states is None:
            return _project(attn, attn.matmul(q, k, v).transpose(1, 2).flatten(2))
        q, k, v = (torch.cat(pair, 2) for pair in zip((q, k, v), _context_heads(attn, encoder_hidden_states)))
        out = attn.matmul(q, k, v).transpose(1, 2).flatten(2)  # (B, N + M, C)
        image, context = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], 1)
        context = context if attn.context_pre_only else attn.to_add_out(context)
        return _project(attn, image), context


class QuantFluxAttention:
    """Context, then image tokens attend together, turned by their positions; in place of ``FluxAttnProcessor``."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        from diffusers.models import embeddings

        turned: Any = embeddings.apply_rotary_emb
        q, k, v = _image_heads(attn, hidden_states)
        if encoder_hidden_states is not None:
            q, k, v = (torch.cat(pair, 2) for pair in zip(_context_heads(attn, encoder_hidden_states), (q, k, v)))
        if image_rotary_emb is not None:
            q, k = turned(q, image_rotary_emb), turned(k, image_rotary_emb)
        out = attn.matmul(q, k, v, attention_mask).transpose(1, 2).flatten(2)  # (B, M + N, C)
        if encoder_hidden_states is None:
            return out  # the block projects it together with its feed-forward path
        context, image = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], 1)
        return _project(attn, image), attn.to_add_out(context)


def _image_heads(attn: Any, tokens: torch.Tensor) -> Heads:
    """Project tokens (B, N, C) to q, k and v, each (B, heads, N, d)."""
    return _heads(attn.heads, tokens, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k))


def _context_heads(attn: Any, tokens: torch.Tensor) -> Heads:
    projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
    return _heads(attn.heads, tokens, projections, (attn.norm_added_q, attn.norm_added_k))


def _heads(heads: int, tokens: torch.Tensor, projections: Any, norms: Any) -> Heads:
    q, k, v = (linear(tokens).unflatten(-1, (heads, -1)).transpose(1, 2) for linear in projections)
    norm_q, norm_k = norms
    return q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v


def _project(attn: Any, tokens: torch.Tensor) -> torch.Tensor:
    for layer in attn.to_out:
        tokens = layer(tokens)
    return tokens


PROCESSORS = {
    "AttnProcessor": QuantAttention,
    "AttnProcessor2_0": QuantAttention,
    "JointAttnProcessor2_0": QuantJointAttention,
    "FluxAttnProcessor": QuantFluxAttention,
}


def check_processor(name: str, module: Any) -> None:
    """Raise EdadmError if the processor of an attention module hides or changes its products."""
    processor = type(module.processor).__name__
    ours = processor in PROCESSORS and type(module.processor).__module__.startswith("diffusers.")
    if not ours or getattr(module, "fused_projections", False):
        raise EdadmError(
            f"{name} uses {processor}{' with fused projections' if ours else ''}, which hides the attention products "
            "from quantization: call unfuse_qkv_projections() if they are fused, or set_processor() with the one of "
            f"{', '.join(PROCESSORS)} that the module had when it was built"
        )
    usual = (module.to_q.out_features / module.heads) ** -0.5
    if processor == "AttnProcessor" and not math.isclose(module.scale, usual):
        raise EdadmError(
            f"{name} scales its logits by {module.scale:.4g}, not by {usual:.4g} for heads of its width: "
            "set its scale along with its heads"
        )


def quantize_products(name: str, module: Any, matmul: AttentionMatmul) -> None:
    """Send the products of an attention module through ``matmul``; its processor can no longer be exchanged."""
    processor = PROCESSORS[type(module.processor).__name__]()
    module.matmul = matmul
    module.set_processor(processor)
    module.set_processor = partial(_refuse_processor, name)


def _refuse_processor(name: str, processor: object, *_: object) -> None:
    raise EdadmError(
        f"{name} has quantized attention products, which {type(processor).__name__} would leave in floating point: "
        "switch attention slicing, xformers and the like on or off before quantization, or not at all"
    )


def attention_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the attention modules of a denoiser with their names."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "set_processor")]

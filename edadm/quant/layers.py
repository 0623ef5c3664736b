"""Quantized layers: a convolution or linear layer with its weight and input quantizers, and the attention products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from edadm.errors import EdadmError
from edadm.quant.quantizer import ActivationQuantizer, WeightQuantizer, is_float
from edadm.quant.rounding import init_alpha, soft_weight

# Attention logits that are computed at a time: so many stay in the cache of a CPU core, or are 1 GiB on a GPU.
LOGITS_AT_A_TIME = {"cpu": 2**18, "cuda": 2**28}


@dataclass(frozen=True)
class LayerBits:
    """Bit widths of one layer. 16 and 32 mean floating point."""

    weight: int
    act: int


class QuantLayer(nn.Module):
    """A Conv1d, Conv2d or Linear whose weight (per output channel) and input (per tensor) are fake-quantized.

    With ``split`` the input is a concatenation of two tensors along channels: each part has its own activation
    quantizer and its own weight quantizer, one convolution runs on both (Q-Diffusion, section 4.2).
    """

    def __init__(
        self,
        source: nn.modules.conv._ConvNd | nn.Linear,
        name: str,
        role: str,
        bits: LayerBits,
        split: int | None = None,
    ):
        super().__init__()
        self.name, self.role, self.bits, self.split = name, role, bits, split
        self.weight = nn.Parameter(source.weight.detach(), requires_grad=False)
        self.bias = None if source.bias is None else nn.Parameter(source.bias.detach(), requires_grad=False)
        self._operation = _operation(source, name)
        parts = 1 if split is None else 2
        suffixes = ("", "_0")[:parts]
        self.weight_quantizers = cast(
            Sequence[WeightQuantizer],
            nn.ModuleList(WeightQuantizer(bits.weight, f"{name}.weight_quantizer{suffix}") for suffix in suffixes),
        )
        self.act_quantizers = cast(
            Sequence[ActivationQuantizer],
            nn.ModuleList(ActivationQuantizer(bits.act, f"{name}.act_quantizer{suffix}") for suffix in suffixes),
        )
        self.weight_enabled = False
        self.weight_is_quantized = False
        self.edges = False
        self.alphas: nn.ParameterList | None = None
        self._dequantized: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.split is None:
            x = self.act_quantizers[0](x)
        elif self.act_quantizers[0].enabled:
            x = torch.cat([quantize(part) for quantize, part in zip(self.act_quantizers, self._parts(x))], 1)
        return self._operation(x, self._effective_weight(), self.bias)

    def _parts(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Split an input (B, C, ...) or a weight (C_out, C, ...) along its channels."""
        if self.split is None:
            return (tensor,)
        return tensor[:, : self.split], tensor[:, self.split :]

    def _effective_weight(self) -> torch.Tensor:
        if not self.weight_enabled or is_float(self.bits.weight):
            return self.weight
        if self.alphas is not None:
            return self._join(
                soft_weight(part, q.scale, q.zero_point, q.levels, alpha, self.edges)
                for part, q, alpha in zip(self._parts(self.weight), self.weight_quantizers, self.alphas)
            )
        return self.quantized_weight()

    def _join(self, parts: Iterable[torch.Tensor]) -> torch.Tensor:
        joined = list(parts)
        return joined[0] if len(joined) == 1 else torch.cat(joined, 1)

    @torch.no_grad()
    def quantized_weight(self) -> torch.Tensor:
        """Return the dequantized weight (C_out, ...), computed once after each change of ranges or rounding."""
        if self.weight_is_quantized:
            return self.weight
        if self._dequantized is None:
            self._dequantized = self._join(
                q.hard(part) for part, q in zip(self._parts(self.weight), self.weight_quantizers)
            )
        return self._dequantized

    @torch.no_grad()
    def weight_codes(self) -> list[torch.Tensor]:
        """Return the unsigned integer codes of each weight part, uint8 with the shape of the part."""
        codes = []
        for part, q in zip(self._parts(self.weight), self.weight_quantizers):
            part = part if self.weight_is_quantized else q.hard(part)  # not kept, unlike quantized_weight
            shape = (-1,) + (1,) * (part.ndim - 1)
            codes.append((part / q.scale.view(shape)).round_().add_(q.zero_point.view(shape)).to(torch.uint8))
        return codes

    @torch.no_grad()
    def set_weight_codes(self, codes: list[torch.Tensor]) -> None:
        """Install stored codes: the full-precision weight is gone, its dequantized value takes its place."""
        parts = []
        for code, q in zip(codes, self.weight_quantizers):
            shape = (-1,) + (1,) * (code.ndim - 1)
            parts.append((code.to(q.scale.dtype) - q.zero_point.view(shape)) * q.scale.view(shape))
        self.weight.data = self._join(parts)
        self.weight_is_quantized = True

    @torch.no_grad()
    def set_weight_ranges(self, ranges) -> None:
        """Set scale and zero point of each weight part; ``ranges.weight(part, bits)`` returns both, each (C_out,)."""
        if is_float(self.bits.weight):
            return
        for part, q in zip(self._parts(self.weight), self.weight_quantizers):
            q.set(*ranges.weight(part, q.bits, q.name))
        self._dequantized = None

    def start_rounding(self) -> list[nn.Parameter]:
        """Make the rounding of each weight part learnable (AdaRound) and return the variables alpha."""
        if is_float(self.bits.weight):
            return []
        self._dequantized = None
        self.alphas = nn.ParameterList(
            nn.Parameter(init_alpha(part, q.scale)) for part, q in zip(self._parts(self.weight), self.weight_quantizers)
        )
        return list(self.alphas)

    @torch.no_grad()
    def finish_rounding(self) -> None:
        """Fix the rounding by the sign of alpha."""
        for alpha, q in zip(self.alphas or (), self.weight_quantizers):
            q.hard_up = alpha >= 0
        self.alphas = None
        self._dequantized = None

    def _apply(self, fn, recurse=True):
        self._dequantized = None  # it must follow the weight to another device, dtype or memory format
        return super()._apply(fn, recurse)

    def invalidate(self) -> None:
        """Forget the cached dequantized weight after scale, zero point or rounding were written from outside."""
        self._dequantized = None


def _operation(source: nn.Module, name: str) -> Callable[..., torch.Tensor]:
    if source.weight.dtype not in (torch.float32, torch.float64):
        raise EdadmError(
            f"{name} has weights of type {source.weight.dtype}, but ranges are set in float32: load the network in "
            "float32 (and sample with it under autocast)"
        )
    if isinstance(source, nn.Linear):
        return F.linear
    if not isinstance(source, nn.Conv1d | nn.Conv2d) or source.padding_mode != "zeros":
        raise EdadmError(
            f"{name}: {type(source).__name__} with padding mode {getattr(source, 'padding_mode', '-')!r} "
            "has no quantized form here; add one to edadm/quant/layers.py"
        )
    convolve = F.conv1d if isinstance(source, nn.Conv1d) else F.conv2d
    stride, padding, dilation, groups = source.stride, source.padding, source.dilation, source.groups

    def convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return convolve(x, weight, bias, stride, padding, dilation, groups)

    return convolution


class AttentionMatmul(nn.Module):
    """Scaled dot-product attention with quantized q, k, v and softmax output (golden README 10.1).

    The logits are scaled after the product of the quantized q and k, as the DDIM and transformer blocks do.
    """

    def __init__(self, name: str, role: str, act_bits: int, softmax_bits: int):
        super().__init__()
        self.name, self.role = name, role
        self.q, self.k, self.v = (ActivationQuantizer(act_bits, f"{name}.{letter}") for letter in "qkv")
        self.w = ActivationQuantizer(softmax_bits, f"{name}.w")

    @property
    def quantizers(self) -> tuple[ActivationQuantizer, ...]:
        """The quantizers of q, k, v and the softmax output."""
        return self.q, self.k, self.v, self.w

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None):
        """q (B, heads, N, d), k and v (B, heads, M, d); mask: bool (True attends) or added to the logits.

        Returns (B, heads, N, d).
        """
        if not any(quantizer.enabled for quantizer in self.quantizers):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        q, k, v = self.q(q), self.k(k).transpose(-1, -2), self.v(v)
        if torch.is_grad_enabled() or self.w.observe is not None or self.w.drop is not None:
            return self._attend(q, k, v, mask)
        limit = LOGITS_AT_A_TIME.get(q.device.type)
        rows = len(q) if limit is None else max(1, limit // (q.shape[1] * q.shape[2] * k.shape[3]))
        parts = [part.split(rows) for part in (q, k, v)]
        masks = [None] * len(parts[0]) if mask is None else mask.expand(len(q), *mask.shape[1:]).split(rows)
        return torch.cat([self._attend(*part) for part in zip(*parts, masks, strict=True)])

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attend with quantized q and v, and with quantized k as (B, heads, d, M)."""
        logits = q @ k * q.shape[-1] ** -0.5
        return self.w((logits if mask is None else logits + mask).softmax(-1)) @ v

"""Uniform affine quantizers: the plain formula, its straight-through form, and the activation and weight modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from edadm.errors import EdadmError
from edadm.quant.rounding import hard_weight, per_channel

MOST_OF_A_DOT = 2**31 - 1  # elements of a product that CUDA takes at once
FLOAT_BITS = 16  # this width and wider ones mean floating point


def is_float(bits: int) -> bool:
    """Tell whether a bit width stands for floating point, so that the quantizer is the identity."""
    return bits >= FLOAT_BITS


def quantize_dequantize(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, levels: int) -> torch.Tensor:
    """Return (clamp(round(x / scale) + zero_point, 0, levels - 1) - zero_point) * scale, without gradient.

    x: any shape, float; scale, zero_point: 0-d or broadcastable to x, zero_point integer-valued. Rounds half to even.
    The zero point moves into the bounds of the clamp, which leaves every value unchanged (-0.0 may stand for 0.0).
    """
    with torch.no_grad():
        return _clamp_codes_(torch.div(x, scale).round_(), zero_point, levels).mul_(scale)


def _clamp_codes_(codes: torch.Tensor, zero_point: torch.Tensor, levels: int) -> torch.Tensor:
    if codes.device.type == "cpu" and zero_point.numel() == 1:  # one pass; reading the bound waits for no device
        low = -zero_point.item()
        return codes.clamp_(low, levels - 1 + low)
    torch.maximum(codes, -zero_point, out=codes)
    return torch.minimum(codes, levels - 1 - zero_point, out=codes)


def _as_float(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    # Through uint8 the conversion is vectorised; arithmetic with the result is many times faster than torch.where.
    return mask.view(torch.uint8).to(like.dtype)


def _select(keep: torch.Tensor, quantized: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return ``quantized`` where keep, x elsewhere, exactly: the weights of the interpolation are 0 and 1."""
    return torch.lerp(x, quantized, _as_float(keep, x))


class _StraightThrough(torch.autograd.Function):
    """Fake quantization with the straight-through gradients of x and scale (golden README 7.4).

    Kept for backward: the mask of elements that stop the gradient of x, and d with dQ/dscale = d / scale.
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, levels, keep, edges):
        codes = torch.div(x, scale).round_()
        half = (levels - 1) / 2
        beyond = torch.sub(codes, half - zero_point).abs_().sub_(half if edges else half - 1)  # > 0: stopped
        stops = beyond.relu_().to(torch.bool)
        y = _clamp_codes_(codes, zero_point, levels).mul_(scale)
        if keep is not None:
            y = _select(keep, y, x)
            stops &= keep
        residual = None
        if ctx.needs_input_grad[1]:
            passed = torch.addcmul(x, x, _as_float(stops, x), value=-1, out=beyond)
            residual = torch.sub(y, passed, out=passed)
        ctx.save_for_backward(stops, residual, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        stops, residual, scale = ctx.saved_tensors
        grad_x = grad_scale = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.addcmul(grad, grad, _as_float(stops, grad), value=-1)
        if residual is not None:
            if scale.numel() == 1:
                total = _dot(grad.reshape(-1), residual.reshape(-1)).view_as(scale)
            else:
                total = (grad * residual).sum_to_size(scale.shape)
            grad_scale = total / scale
        return grad_x, grad_scale, None, None, None, None


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.numel() <= MOST_OF_A_DOT:
        return torch.dot(a, b)
    return torch.stack([torch.dot(*parts) for parts in zip(a.split(MOST_OF_A_DOT), b.split(MOST_OF_A_DOT))]).sum()


def quantize_ste(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    levels: int,
    keep: torch.Tensor | None = None,
    edges: bool = False,
) -> torch.Tensor:
    """Quantize and dequantize x with straight-through gradients to x and scale.

    scale, zero_point: 0-d or broadcastable to x. keep: bool mask shaped like x; where False the element of x passes
    through unquantized (QDrop) and gives no gradient to scale. With r = x / scale and c = clamp(round(r) + zero_point)
    an element inside the range passes the gradient to x and gives round(r) - r to scale; one outside stops it and gives
    c - zero_point. This is LSQ without its gradient factor. Source: golden README 7.4 and 7.5.

    edges: whether codes 0 and levels - 1 count as inside. The official clamp says no under torch >= 2.14, which made
    the golden vectors, and yes under every earlier torch, which made the published numbers.
    """
    return _StraightThrough.apply(x, scale, zero_point, levels, keep, edges)


class RangeSetter(Protocol):
    """Sets the range of an activation quantizer from the tensors it sees (``edadm.quant.ranges``)."""

    def update(self, quantizer: ActivationQuantizer, x: torch.Tensor) -> None:
        """Take in one batch x and set scale and zero point of the quantizer."""


DropSource = Callable[[str, torch.Size, torch.device], torch.Tensor]


class ActivationQuantizer(nn.Module):
    """Fake-quantize a tensor with one scale and zero point; observe its range, drop (QDrop) and train on demand.

    ``observe``: while set, every forward first updates the range with its input. ``drop``: source of the QDrop mask,
    called with (name, shape, device), True where the quantized value is used. ``training_grad``: straight-through
    gradients to the input and the scale, ``edges`` as in ``quantize_ste``. ``enabled``: off means identity, and so do
    16 bits or more.
    """

    scale: nn.Parameter
    zero_point: torch.Tensor

    def __init__(self, bits: int, name: str):
        super().__init__()
        self.bits, self.name = bits, name
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        self.register_buffer("zero_point", torch.zeros(()))
        self.enabled = False
        self.ready = False
        self.training_grad = False
        self.edges = False
        self.observe: RangeSetter | None = None
        self.drop: DropSource | None = None
        self.reset_range()

    @property
    def levels(self) -> int:
        """Number of codes, 2 ** bits."""
        return 2**self.bits

    def reset_range(self) -> None:
        """Forget the running range, so that the next observed batch counts as the first."""
        self.running: tuple[torch.Tensor, torch.Tensor] | None = None  # minimum and maximum, each (1,)
        self.side: str | None = None
        self.ready = False

    @torch.no_grad()
    def set(self, scale: torch.Tensor | float, zero_point: torch.Tensor | float) -> None:
        """Set scale and zero point (one element each) and mark the quantizer ready."""
        self.scale.copy_(torch.as_tensor(scale).reshape(()))
        self.zero_point.copy_(torch.as_tensor(zero_point).reshape(()))
        self.ready = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x quantized and dequantized (any shape). Raises EdadmError when enabled without a range."""
        if not self.enabled or is_float(self.bits):
            return x
        if self.observe is not None:
            with torch.no_grad():
                self.observe.update(self, x.detach())
        if not self.ready:
            raise EdadmError(
                f"activation quantizer {self.name} is enabled but has no range: "
                "set its range on calibration data or load a quantized network first"
            )
        keep = None if self.drop is None else self.drop(self.name, x.shape, x.device)
        if self.training_grad:
            return quantize_ste(x, self.scale, self.zero_point, self.levels, keep, self.edges)
        y = quantize_dequantize(x, self.scale, self.zero_point, self.levels)
        return y if keep is None else _select(keep, y, x)

    def extra_repr(self) -> str:
        """Describe the quantizer in the module's repr."""
        return f"{self.name}, bits={self.bits}, ready={self.ready}, enabled={self.enabled}"


class WeightQuantizer(nn.Module):
    """Per-output-channel quantizer of a weight: scale and zero_point (C_out,), and the learned rounding once fixed.

    ``hard_up`` (bool, shape of the weight) says which weights round up from floor(weight / scale); None means nearest.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    hard_up: torch.Tensor | None

    def __init__(self, bits: int, name: str):
        super().__init__()
        self.bits, self.name = bits, name
        self.register_buffer("scale", torch.empty(0))
        self.register_buffer("zero_point", torch.empty(0))
        self.register_buffer("hard_up", None)

    @property
    def levels(self) -> int:
        """Number of codes, 2 ** bits."""
        return 2**self.bits

    @property
    def ready(self) -> bool:
        """Tell whether scale and zero point have been set."""
        return self.scale.numel() > 0

    @torch.no_grad()
    def set(self, scale: torch.Tensor, zero_point: torch.Tensor) -> None:
        """Set scale and zero point, each (C_out,), and go back to nearest rounding."""
        self.scale, self.zero_point, self.hard_up = scale.detach().clone(), zero_point.detach().clone(), None

    @torch.no_grad()
    def hard(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the dequantized weight (C_out, ...): rounded to nearest, or as ``hard_up`` says once it is set.

        Raises EdadmError without a range.
        """
        if is_float(self.bits):
            return weight
        if not self.ready:
            raise EdadmError(f"weight quantizer {self.name} has no range: set the weight ranges first")
        if self.hard_up is not None:
            return hard_weight(weight, self.scale, self.zero_point, self.levels, self.hard_up)
        scale, zero_point = per_channel(self.scale, weight), per_channel(self.zero_point, weight)
        return quantize_dequantize(weight, scale, zero_point, self.levels)

    def extra_repr(self) -> str:
        """Describe the quantizer in the module's repr."""
        return f"{self.name}, bits={self.bits}, ready={self.ready}"

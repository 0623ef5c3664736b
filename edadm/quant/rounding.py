"""AdaRound: learned rounding of weights through the variable alpha (golden README 8)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

GAMMA, ZETA = -0.1, 1.1  # stretch of the rectified sigmoid, AdaRound eq. 23


def per_channel(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """View values (C_out elements) so that they broadcast over the output channels of weight (C_out, ...)."""
    return values.reshape((-1,) + (1,) * (weight.ndim - 1))


@torch.no_grad()
def init_alpha(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the alpha (shape of weight) at which the soft rounding reproduces the full-precision weight.

    scale: (C_out,). With f the fractional part of weight / scale, h(alpha) = f. Source: golden README 8.1.
    """
    ratio = weight / per_channel(scale, weight)
    fraction = ratio - ratio.floor()
    return -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)


def rectified_sigmoid(alpha: torch.Tensor) -> torch.Tensor:
    """Return h(alpha) = clamp(sigmoid(alpha) * (zeta - gamma) + gamma, 0, 1), the share of a step to round up."""
    return (torch.sigmoid(alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def _inside(values: torch.Tensor, upper: float, edges: bool) -> torch.Tensor:
    return (values >= 0) & (values <= upper) if edges else (values > 0) & (values < upper)


class _SoftWeight(torch.autograd.Function):
    """The soft weight with its gradient to alpha; keeps one tensor, d(weight) / d(alpha)."""

    @staticmethod
    def forward(ctx, alpha, weight, scale, zero_point, levels, edges):
        sigmoid = torch.sigmoid(alpha)
        stretched = sigmoid * (ZETA - GAMMA) + GAMMA
        h = stretched.clamp(0, 1)
        codes = torch.div(weight, scale).floor_().add_(h).add_(zero_point)
        moves = _inside(stretched, 1, edges) & _inside(codes, levels - 1, edges)
        slope = sigmoid.mul_(1 - sigmoid).mul_(ZETA - GAMMA).mul_(scale).mul_(moves)
        ctx.save_for_backward(slope)
        return codes.clamp_(0, levels - 1).sub_(zero_point).mul_(scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None, None, None, None


def soft_weight(
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    levels: int,
    alpha: torch.Tensor,
    edges: bool = False,
) -> torch.Tensor:
    """Return (clamp(floor(w / s) + h(alpha) + z, 0, levels - 1) - z) * s with its gradient to alpha.

    weight, alpha: (C_out, ...); scale, zero_point: (C_out,). Both clamps, of h and of the codes, stop the gradient
    outside their bounds; edges: whether a value exactly on a bound still passes it, see ``quantizer.quantize_ste``.
    Weights that lie on the grid start there. Source: golden README 8.1.
    """
    scale, zero_point = per_channel(scale, weight), per_channel(zero_point, weight)
    return _SoftWeight.apply(alpha, weight, scale, zero_point, levels, edges)


@torch.no_grad()
def hard_weight(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, levels: int, up: torch.Tensor
) -> torch.Tensor:
    """Return the dequantized weight that rounds up where ``up`` (bool, [alpha >= 0]) and down elsewhere.

    weight, up: (C_out, ...); scale, zero_point: (C_out,). Source: golden README 8.1.
    """
    scale, zero_point = per_channel(scale, weight), per_channel(zero_point, weight)
    codes = torch.div(weight, scale).floor_().add_(up)
    return codes.clamp_(-zero_point, levels - 1 - zero_point).mul_(scale)


def regulariser(alphas: Iterable[torch.Tensor], beta: float) -> torch.Tensor:
    """Return the sum over all alphas of 1 - |2 h(alpha) - 1| ** beta, which pushes h to 0 or 1.

    The weight (0.01 in Q-Diffusion; EDA-DM disables the term) is the caller's. Source: golden README 8.2.
    """
    terms = [(1 - (rectified_sigmoid(alpha) - 0.5).abs().mul(2).pow(beta)).sum() for alpha in alphas]
    return torch.stack(terms).sum()


def beta_schedule(
    iteration: int, iterations: int, start: float = 20, end: float = 2, warmup: float = 0.2
) -> float | None:
    """Return the exponent of the regulariser at an iteration counted from 1; None during warm-up, when it is off.

    Linear from start to end over the iterations after the share ``warmup``. Source: golden README 8.2.
    """
    first = warmup * iterations
    if iteration < first:
        return None
    return end + (start - end) * max(0.0, 1 - (iteration - first) / (iterations - first))

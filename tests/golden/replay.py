"""Replay the official random choices of a reconstruction and compare its course with the stored one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import numpy as np
import torch

from edadm.quant.network import Unit
from edadm.quant.quantizer import ActivationQuantizer
from edadm.reconstruction.loop import Step
from edadm.reconstruction.random import INPUT_MIX, RandomSource

FIRST_LOSS = 1e-5  # golden README 9.12, relative
TIE = 1e-6  # relative float32 noise of an activation, as another convolution library gives it


class Replay(RandomSource):
    """Minibatches and masks from stored tensors; ``names`` translates our quantizer names to the official ones."""

    def __init__(self, tensors: dict, mask_shapes: dict, names: dict[str, str], prefix: str = ""):
        super().__init__(0)
        self.tensors, self.mask_shapes, self.names, self.prefix = tensors, mask_shapes, names, prefix
        self.iteration = -1

    def indices(self, iteration, rows, batch):
        self.iteration = iteration
        index = self.tensors[f"{self.prefix}idx"][iteration]
        assert len(index) == batch and int(index.max()) < rows
        return index.long()

    def mask(self, iteration, site, pass_index, shape, p, device):
        name = site if site == INPUT_MIX else self.names[site]
        packed = self.tensors[f"{self.prefix}mask.{name}.pass{pass_index}"][iteration]
        official = self.mask_shapes[name]
        flat = np.unpackbits(packed.numpy(), count=math.prod(official))
        return to_our_layout(torch.from_numpy(flat).bool().view(official), name, len(shape)).view(shape)


def to_our_layout(x: torch.Tensor, name: str, ndim: int) -> torch.Tensor:
    """Official q (B, N, C), k and v (B, C, N), softmax (B, keys, queries), projection inputs (B, C, h, w)."""
    if name.endswith(("act_quantizer_k", "act_quantizer_v", "act_quantizer_w")):
        return x.transpose(1, 2)
    if x.ndim == 4 and ndim == 3:
        return x.flatten(2).transpose(1, 2)
    return x


@contextmanager
def flipped_ties(quantizers: Iterable[ActivationQuantizer], replay: Replay):
    """In the first iteration, move what lies within float noise of a rounding tie to its other side.

    The stored first loss holds for one side of each tie. On a machine that falls on the other side a single code moves
    the loss by more than its tolerance of 1e-5: the comparison then names the site instead of widening the tolerance.
    """

    def move(quantizer: ActivationQuantizer, inputs: tuple[torch.Tensor]):
        if replay.iteration != 0:
            return None
        codes = (inputs[0] / quantizer.scale).detach()
        beyond = codes - codes.floor() - 0.5
        distance = TIE * codes.abs()
        return inputs[0] - (beyond.abs() < distance) * beyond.sign() * 2 * distance * quantizer.scale.detach()

    handles = [quantizer.register_forward_pre_hook(move) for quantizer in quantizers]
    yield
    for handle in handles:
        handle.remove()


def sites_to_flip(error: Callable[[frozenset[str]], float], sites: Iterable[str], enough: float) -> frozenset[str]:
    """Find greedily the quantizers whose ties must flip; error(sites) is that of the first loss. Mostly none."""
    flipped: frozenset[str] = frozenset()
    best = error(flipped)
    for site in sites:
        if best <= enough:
            break
        found = error(flipped | {site})
        if found < best:
            best, flipped = found, flipped | {site}
    return flipped


def parameters_of(unit: Unit, quantizers: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """Official parameter name -> our rounding variable (while it exists) or activation scale."""
    alphas = {
        quantizer: alpha
        for layer in unit.layers
        for quantizer, alpha in zip(layer.weight_quantizers, layer.alphas or ())
    }
    named = {f"{name}.alpha": alphas[q] for name, q in quantizers.items() if q in alphas}
    return named | {f"{name}.delta": q.scale for name, q in quantizers.items() if "act_quantizer" in name}


class Recorder:
    """Observer that keeps losses, first gradients and the variables themselves."""

    def __init__(self, quantizers: dict[str, torch.nn.Module]):
        self.quantizers = quantizers
        self.losses: dict[str, list] = {"total": [], "block": [], "layers": [], "rounding": []}
        self.data = None

    def __call__(self, step: Step) -> None:
        losses = step.losses
        self.losses["total"].append(losses.total.item())
        self.losses["block"].append(losses.unit.item())
        self.losses["layers"].append([loss.item() for loss in losses.layers])
        self.losses["rounding"].append(0.0 if losses.rounding is None else losses.rounding.item())
        if step.iteration == 0:
            self.data = step.data
            self.parameters = parameters_of(step.unit, self.quantizers)
            self.gradients = {n: p.grad.clone() for n, p in self.parameters.items() if p.grad is not None}


def curve_error(recorded: list, stored: torch.Tensor) -> torch.Tensor:
    """Relative error per iteration."""
    return (torch.tensor(recorded) - stored).abs() / stored.abs().clamp_min(1e-30)


def sampled(parameter: torch.Tensor, stride: int) -> torch.Tensor:
    return parameter.detach().flatten()[::stride]


def relative_to_max(value: torch.Tensor, stored: torch.Tensor) -> float:
    return ((value - stored).abs().max() / stored.abs().max()).item()


def self_noise(case: dict) -> dict:
    """What the official code does to itself when its inputs are multiplied by 1 + 1e-6 z."""
    return case["self_noise_after_1e_6_input_perturbation"]


def assert_course_equals(case: dict, tensors: dict, recorder: Recorder) -> None:
    """Compare losses, first gradients and final variables within the limits of golden README 9.12."""
    noise, losses = self_noise(case), recorder.losses
    error = curve_error(losses["total"], tensors["loss.total"])
    assert error[0] <= FIRST_LOSS
    assert error.max() <= 3 * max(noise["loss_total_max_rel"], 1e-3)
    if "loss.block" in tensors:
        assert curve_error(losses["block"], tensors["loss.block"])[0] <= FIRST_LOSS
    if losses["layers"][0]:
        assert (torch.tensor(losses["layers"][0]) / tensors["loss.layers"][0] - 1).abs().max() <= FIRST_LOSS
    assert set(case["sample_strides"]) == set(recorder.parameters)
    for name, stride in case["sample_strides"].items():
        own = noise["params"][name]
        gradient = sampled(recorder.gradients[name], stride)
        limit = max(3e-4, 3 * own["grad1_max_rel_to_max"])
        assert relative_to_max(gradient, tensors[f"grad1.{name}"]) <= limit, name
        if f"grad1_norm.{name}" in tensors:
            norm = recorder.gradients[name].norm()
            assert relative_to_max(norm, tensors[f"grad1_norm.{name}"].squeeze()) <= limit, name
        final, stored = sampled(recorder.parameters[name], stride), tensors[f"final.{name}"]
        if name.endswith("alpha"):
            moved = own.get("final_frac_gt_0p01", own.get("final_frac_gt_0p001"))
            assert (~((final - stored).abs() <= 0.01)).float().mean() <= max(0.03, 3 * moved), name
        else:
            moved = own.get("final_rel_to_max", own["final_max"] / stored.abs().max().item())
            assert relative_to_max(final, stored) <= max(0.01, 3 * moved), name

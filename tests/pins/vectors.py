"""What is pinned: for each part its version, where that is raised, and a few of its numbers on fixed inputs.

Inputs are formulas, so that they are the same with every version of every library. The rows that samplers of
calibration rows select, noise, and runs of the diffusion samplers are pinned in their own tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from edadm import keys
from edadm.calibration import tdac
from edadm.metrics import aesthetic, bootstrap, clip, dinov2, draws, inception, paired, tiny
from edadm.metrics.frechet import statistics
from edadm.metrics.references import FeatureReference
from edadm.metrics.registry import METRICS
from edadm.quant.calibrate import set_activation_ranges, set_weight_ranges
from edadm.quant.network import Bits, QuantModel
from edadm.quant.quantizer import ActivationQuantizer, quantize_dequantize, quantize_ste
from edadm.quant.ranges import MSE, MinMax, QDiffusionMinMax, QDiffusionShrink
from edadm.quant.rounding import beta_schedule, hard_weight, init_alpha, regulariser, soft_weight
from edadm.reconstruction.random import seeded
from edadm.reconstruction.reconstruct import reconstruct
from edadm.reconstruction.settings import Joint, TwoPhase
from tests.toys import tiny_unet

REL = 1e-4  # rounding of float32 sums, with room for another order of summation


@dataclass(frozen=True)
class Pin:
    """A part: its version, what to raise when its numbers change, and how to compute them; rel: their tolerance."""

    version: int
    raises: str
    compute: Callable[[], Iterable[float]]
    rel: float = REL


def wave(*shape: int, phase: float = 0.0) -> torch.Tensor:
    """Numbers in (-1.7, 1.7) without symmetry, float32."""
    n = torch.arange(int(np.prod(shape)), dtype=torch.float64)
    return (torch.sin(1.3 * n + phase) + 0.7 * torch.sin(0.37 * n * n + 2 * phase)).float().view(shape)


def pictures(n: int, phase: float = 0.0) -> torch.Tensor:
    """Return uint8 images (n, 3, 16, 16)."""
    return ((wave(n, 3, 16, 16, phase=phase) + 1.7) * 75).to(torch.uint8)


def pins() -> dict[str, Pin]:
    """Return every pinned part by name."""
    return dict([*_quantizer(), *_ranges(), *_reconstruction(), *_calibration(), *_metrics()])


def _quantizer() -> Iterator[tuple[str, Pin]]:
    called = "VERSION in edadm/keys.py (what all stages call)"
    x, scale, zero_point = wave(24), torch.tensor(0.21), torch.tensor(6.0)

    def gradients() -> list[float]:
        leaf, step = x.clone().requires_grad_(), scale.clone().requires_grad_()
        quantize_ste(leaf, step, zero_point, 16, keep=wave(24, phase=1) > 0).dot(wave(24, phase=2)).backward()
        assert leaf.grad is not None and step.grad is not None
        return [*leaf.grad.tolist(), float(step.grad)]

    def rounding() -> list[float]:
        weight, scales, zeros = wave(3, 8), torch.tensor([0.2, 0.3, 0.4]), torch.tensor([7.0, 8.0, 7.0])
        alpha = init_alpha(weight, scales)
        moved = (alpha + wave(3, 8, phase=1)).requires_grad_()
        soft = soft_weight(weight, scales, zeros, 16, moved)
        (soft.square().sum() + regulariser([moved], 4.0)).backward()
        assert moved.grad is not None
        hard = hard_weight(weight, scales, zeros, 16, moved >= 0)
        betas = [beta_schedule(k, 10) or 0.0 for k in range(1, 11)]
        return [*alpha[0].tolist(), *soft[1].tolist(), *hard[2].tolist(), *moved.grad[0].tolist(), *betas]

    yield "quantizer", Pin(keys.VERSION, called, lambda: quantize_dequantize(x, scale, zero_point, 16).tolist())
    yield "straight-through gradients", Pin(keys.VERSION, called, gradients)
    yield "rounding", Pin(keys.VERSION, called, rounding)


def _ranges() -> Iterator[tuple[str, Pin]]:
    rules = (MSE(), MSE(symmetric=False, candidates=20), MSE(mid_zero_point=True), MinMax(), QDiffusionMinMax())
    others = (QDiffusionMinMax(symmetric=False, running=True), QDiffusionShrink())

    def numbers(rule: Any) -> list[float]:
        found = torch.cat(rule.weight(wave(4, 9), 4)).tolist()
        for offset in (0.0, 3.0):  # on both sides of zero, and on one
            quantizer = ActivationQuantizer(6, "pinned")
            for batch in (wave(40) + offset, 1.5 * wave(40, phase=1) + offset):
                rule.update(quantizer, batch)
                found += [float(quantizer.scale), float(quantizer.zero_point)]
        return found

    for rule in (*rules, *others):
        yield f"ranges {_settings(rule)}", Pin(rule.version, _class(rule), partial(numbers, rule))


def _reconstruction() -> Iterator[tuple[str, Pin]]:
    joint = Joint(3, lr_weight=0.05, lr_act=1e-3, batch=4)
    shared = Joint(3, lr_weight=0.05, lr_act=1e-3, batch=4, layer_loss_pass="shared", excluded_layer="main_path")
    phases = TwoPhase(3, 3, lr_weight=0.05, batch=4)
    cases = {"joint, fbr": (joint, "fbr"), "joint, fbr, shared pass": (shared, "fbr")}
    cases |= {"joint, layer": (joint, "layer"), "two_phase, block": (phases, "block")}

    def losses(settings: Joint | TwoPhase, granularity: str) -> list[float]:
        network, rows = QuantModel.wrap(tiny_unet(), Bits(4, 8)), (wave(8, 3, 8, 8), torch.arange(8) * 120)
        set_weight_ranges(network, MSE())
        set_ranges = partial(set_activation_ranges, network, MSE(), [lambda: network(*rows)])
        found: list[float] = []
        reconstruct(
            network, rows, settings, granularity, seeded(0), limit=5, set_activation_ranges=set_ranges,
            observe=lambda step: found.append(float(step.losses.total.detach())),
        )  # fmt: skip
        return found

    for name, (settings, granularity) in cases.items():
        # a code on a rounding tie may fall on the other side on another processor
        yield (
            f"reconstruction {name}",
            Pin(settings.version, _class(settings), partial(losses, settings, granularity), 1e-2),
        )


def _calibration() -> Iterator[tuple[str, Pin]]:
    features = wave(6, 5, 4, 2, 2).cumsum(0)

    def scores() -> list[float]:
        near, r = tdac.density(features)
        apart = tdac.variety(features)
        return [*near.tolist(), r, *apart.tolist(), *tdac.shares(near, apart, 1.2).tolist()]

    yield "TDAC's scores", Pin(tdac.TDAC.version, _class(tdac.TDAC()), scores)


def _metrics() -> Iterator[tuple[str, Pin]]:
    n, pooled, spatial, logits = 40, wave(40, 6), wave(40, 5, phase=1), wave(40, 4, phase=2)
    others = wave(44, 6, phase=3)
    real = FeatureReference(statistics(others), statistics(wave(44, 5, phase=4)), others, 44, "pinned", None)
    seen = inception.InceptionFeatures(pooled, spatial, logits)
    small = tiny.TinyFeatures(pooled, spatial, logits)
    fp = tiny.TinyFeatures(pooled + 0.1 * wave(40, 6, phase=5), spatial, logits)
    proxy = tiny.TinyReference(real.pooled, statistics(wave(44, 5, phase=4)), np.zeros(0), np.zeros(0), 44, "", "")
    one, two = pictures(4), pictures(4, phase=0.1)
    embeddings = [torch.nn.functional.normalize(wave(n, 6, phase=phase), dim=1) for phase in (0.0, 0.5)]
    steps = paired.sqnr_per_step(
        lambda x, t: x.sin(), lambda x, t: x.sin() + 0.01 * x, wave(2, 6, 3, 4, 4), (500, 0), batch=4
    )
    values: dict[str, Callable[[], Iterable[float]]] = {
        "fid": lambda: [inception.fid(seen, real)],
        "fid_infinity": lambda: [inception.fid_infinity(seen, real, np.random.default_rng(0))],
        "sfid": lambda: [inception.sfid(seen, real)],
        "is": lambda: inception.inception_score(seen),
        "kid": lambda: inception.kid(seen, real, subset_size=20),
        "precision": lambda: inception.precision_recall(seen, real)[:1],
        "recall": lambda: inception.precision_recall(seen, real)[1:],
        "fd_tiny": lambda: [tiny.fd_tiny(small, proxy)],
        "fd_tiny_infinity": lambda: [bootstrap.frechet_infinity(pooled, real.pooled, np.random.default_rng(0))],
        "sfd_tiny": lambda: [tiny.sfd_tiny(small, proxy)],
        "is_tiny": lambda: [tiny.is_tiny(small)],
        "fd_tiny_to_fp": lambda: [tiny.fd_tiny(small, fp)],
        "sqnr": lambda: [steps.mean, *steps.values],
        "psnr": lambda: paired.psnr(one, two),
        "ssim": lambda: paired.ssim(one, two),
        "clip": lambda: clip.scores(*embeddings)[:6],
        "clip_tiny": lambda: clip.scores(*embeddings)[:6],
        "aesthetic": lambda: aesthetic.scores(embeddings[0], aesthetic.Head(wave(6).double(), 5.0, "pinned", ""))[:6],
        "fd_dinov2": lambda: [dinov2.fd_dinov2(pooled, real.pooled)],
    }
    for name, compute in values.items():
        yield f"metric {name}", Pin(METRICS[name].version, f"the version of {name} in METRICS", compute)
    resampled = partial(_resampled, one, two)
    yield "resampling", Pin(draws.VERSION, "VERSION in edadm/metrics/draws.py", resampled)


def _resampled(one: torch.Tensor, two: torch.Tensor) -> list[float]:
    evaluation = draws.Evaluation(one, None, None, seed=3, resamples=4)
    return [float(value) for value in evaluation.resample(two, ["psnr"])["psnr"].draws]


def _settings(part: Any) -> str:
    return repr(part).replace(f", version={part.version}", "").replace(f"(version={part.version})", "()")


def _class(part: Any) -> str:
    return f"`version` of {type(part).__name__} in {type(part).__module__}"

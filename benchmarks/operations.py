"""The work of golden README 15 on its small network, and one sampling step of the embedded task."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.timing import Pairs, Row
from edadm.calibration.tdac import density, shares, variety
from edadm.quant.calibrate import set_activation_ranges, set_weight_ranges
from edadm.quant.network import Bits, QuantModel, SitePlan, Unit, unit_state
from edadm.quant.ranges import MSE
from edadm.reconstruction.passes import PausedPasses
from edadm.reconstruction.random import seeded
from edadm.reconstruction.reconstruct import reconstruct
from edadm.reconstruction.settings import Joint, Phase, TwoPhase
from edadm.sampling.ddim import Sampler

# The network of golden README 3.1.
CONFIG = {
    "sample_size": 16,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64, 64),
    "layers_per_block": 2,
    "downsample_padding": 0,
    "attention_head_dim": None,
    "norm_num_groups": 32,
    "norm_eps": 1e-6,
}
EDGE = {"time_mlp_1": {"weight": 8}, "output": {"weight": 8, "act": 32}}  # preset released
LR_WEIGHT, LR_ACT = 5e-1, 5e-4  # CIFAR-10 W4, golden README 13
BATCH = 32  # of the reference, the minibatches and the cached rows
RANGE_ROWS, RANGE_BATCH = 64, 16


@dataclass(frozen=True)
class Known:
    """What the official code needs for an operation and what we aim at, in forward passes."""

    official: str = "-"
    target: str = "-"


# The official amount of work, done here: what a forward pass is worth on this machine.
YARDSTICK = "yardstick: the same by a double loop over pairs"
# official: golden README 15. target: what this project aims at.
KNOWN = {
    "fake-quantized forward, W4A8": Known("1.5-1.7", "1.15"),
    "fake-quantized forward, W4": Known("1.0"),
    "weight ranges of the network, W4, incl. one forward": Known("19-33"),
    "activation ranges, 64 rows in 4 batches": Known("215-360", "30"),
    "FBR iteration, split resnet, separate pass": Known("2.1-2.4", "0.8"),
    "FBR iteration, mid resnet, separate pass": Known("0.25-0.4"),
    "FBR iteration, attention, separate pass": Known("1.4-2.0"),
    "caching inputs and targets of one unit, 32 rows": Known("1.5-2.3"),
    "TDAC scores, 100 steps x 64 trajectories": Known("95-130", "5"),
    YARDSTICK: Known("95-130"),
}
OFFICIAL_UNIT = "45-50 ms"  # the forward pass in golden README 15
YARDSTICK_STEPS = 5  # of 100, scaled


@dataclass(frozen=True)
class Bench:
    """The network in full precision and quantized with ranges set, calibration rows, and how often to measure."""

    full: nn.Module
    network: QuantModel
    x: torch.Tensor
    timestep: torch.Tensor
    clock: Callable[[], float]
    repeats: int

    def reference(self) -> None:
        """Run one full-precision forward pass at batch 32."""
        forward(self.full, self.x[:BATCH], self.timestep[:BATCH])

    def pairs(self) -> Pairs:
        """Return a new measurement beside the reference."""
        return Pairs(self.reference, self.clock)

    def row(self, operation: str, pairs: Pairs, parts: float = 1) -> Row:
        """Return the line of an operation with what is known of it."""
        known = KNOWN.get(operation, Known())
        return Row.of(operation, pairs, known.official, known.target, parts)


@torch.no_grad()
def forward(network: nn.Module, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Return the noise that an unconditional diffusers network predicts."""
    return network(x, timestep, return_dict=False)[0]


def golden_folder() -> Path | None:
    """Return the folder of the official small network, None if its weights are not at hand."""
    shared = Path(__file__).resolve().parents[2] / "shared" / "golden"
    folder = Path(os.environ.get("EDADM_GOLDEN", shared)) / "eda_ddim" / "01_mapping"
    return folder if (folder / "weights.safetensors").is_file() else None


def small_network() -> nn.Module:
    """Return the small network of the golden vectors, or its like with random weights."""
    from diffusers import UNet2DModel
    from safetensors.torch import load_file

    from edadm.tasks.ddim_checkpoint import convert, load_state

    folder = golden_folder()
    if folder is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            random: Any = UNet2DModel(**CONFIG)
            return random
    case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "weights.safetensors")
    state = convert({name: tensor.float() for name, tensor in weights.items()}, len(case["network"]["ch_mult"]))
    model: Any = UNet2DModel(**case["diffusers_config"])
    return load_state(model, state, str(folder))


def prepare(full: nn.Module, device: torch.device, clock: Callable[[], float], repeats: int, rows: int) -> Bench:
    """Quantize a copy of a full-precision network to W4A8 on ``rows`` rows of noise; ``full`` is moved and frozen."""
    full = full.to(device).eval().requires_grad_(False)
    config: Any = full.config
    size, channels = config.sample_size, config.in_channels
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, channels, size, size, generator=generator).to(device)
    timestep = torch.randint(0, 1000, (rows,), generator=generator).to(device)
    network = QuantModel.wrap(copy.deepcopy(full), Bits(4, 8), SitePlan(edge=EDGE))
    bench = Bench(full, network, x, timestep, clock, repeats)
    set_weight_ranges(network, MSE())
    set_activation_ranges(network, MSE(), range_batches(bench))
    return bench


def range_batches(bench: Bench) -> Iterator[Callable[[], object]]:
    """Yield one run of the network per batch of 16 rows."""
    for x, timestep in zip(bench.x.split(RANGE_BATCH), bench.timestep.split(RANGE_BATCH), strict=True):
        yield partial(forward, bench.network, x, timestep)


def forwards(bench: Bench) -> Iterator[Row]:
    """Time fake-quantized forward passes."""
    for bits, activations in (("W4A8", True), ("W4", False)):
        bench.network.set_state(weights=True, activations=activations)
        run = partial(forward, bench.network, bench.x[:BATCH], bench.timestep[:BATCH])
        pairs = bench.pairs().repeat(run, 3 * bench.repeats)
        yield bench.row(f"fake-quantized forward, {bits}", pairs)


def ranges(bench: Bench) -> Iterator[Row]:
    """Time the range searches of the whole network."""

    def weights() -> None:
        set_weight_ranges(bench.network, MSE())
        bench.network.set_state(weights=True, activations=False)
        forward(bench.network, bench.x[:BATCH], bench.timestep[:BATCH])

    def activations() -> None:
        for quantizer in bench.network.activation_quantizers:
            quantizer.reset_range()
        set_activation_ranges(bench.network, MSE(), range_batches(bench))

    yield bench.row("weight ranges of the network, W4, incl. one forward", bench.pairs().repeat(weights, bench.repeats))
    pairs = bench.pairs().repeat(activations, bench.repeats)
    yield bench.row(f"activation ranges, {len(bench.x)} rows in {len(bench.x) // RANGE_BATCH} batches", pairs)


@dataclass(frozen=True)
class OnePhase:
    """One of the phases of an optimisation, to be timed alone."""

    settings: Joint | TwoPhase
    number: int = 0

    def phases(self, kind: str = "block") -> tuple[Phase, ...]:
        """Return this phase alone for a unit of this kind."""
        return self.settings.phases(kind)[self.number : self.number + 1]


def joint(count: int, layer_loss_pass: str = "shared") -> OnePhase:
    """Return EDA-DM's only phase with so many iterations."""
    return OnePhase(
        Joint(count, lr_weight=LR_WEIGHT, lr_act=LR_ACT, layer_loss_pass=layer_loss_pass, batch=BATCH),
    )


def two_phase(count: int, number: int) -> OnePhase:
    """Return the phase of the rounding (0) or of the activation scales (1) with so many iterations."""
    return OnePhase(TwoPhase(count, count, batch=BATCH), number)


KINDS: dict[str, tuple[str, Callable[[int], OnePhase]]] = {
    "FBR iteration, {}, separate pass": ("fbr", partial(joint, layer_loss_pass="separate")),
    "FBR iteration, {}, shared pass": ("fbr", joint),
    "block-wise iteration, {}": ("block", joint),
    "block-wise iteration, {}, two-phase, rounding": ("block", partial(two_phase, number=0)),
    "block-wise iteration, {}, two-phase, activations": ("block", partial(two_phase, number=1)),
    "layer-wise iteration, first layer of {}": ("layer", joint),
    "layer-wise iteration, first layer of {}, two-phase, rounding": ("layer", partial(two_phase, number=0)),
    "layer-wise iteration, first layer of {}, two-phase, activations": ("layer", partial(two_phase, number=1)),
}
"""The iterations of every granularity and optimisation: how a line is called, and its granularity and phase."""


def iterations(bench: Bench) -> Iterator[Row]:
    """Time iterations on three blocks, and on the first layer of each."""
    blocks, layers = bench.network.units("block"), bench.network.units("layer")
    for name, index in units_to_time(blocks).items():
        first = next(i for i, layer in enumerate(layers) if layer.name.startswith(blocks[index].name + "."))
        for title, (granularity, phase) in KINDS.items():
            pairs, settings = bench.pairs(), phase(4 * bench.repeats + 1)
            unit = first if granularity == "layer" else index
            reconstruct_unit(bench, unit, granularity, settings, lambda step, pairs=pairs: pairs.next())
            yield bench.row(title.format(name), pairs)


def reconstruct_unit(
    bench: Bench, index: int, granularity: str, settings: OnePhase, observe: Callable[[Any], None]
) -> None:
    """Reconstruct one unit alone; observe: called with the losses of every iteration."""
    (one,) = settings.phases()
    earlier = bench.network.units("layer" if granularity == "layer" else "block")[:index]
    reconstruct(
        bench.network,
        (bench.x, bench.timestep),
        settings,
        granularity,
        seeded(0),
        done={f"{one.name}.{unit.name}": unit_state(unit) for unit in earlier},
        observe=observe,
        limit=index + 1,
    )


def units_to_time(units: list[Unit]) -> dict[str, int]:
    """Return the positions of the widest resnet with a split shortcut, the first mid resnet and the last attention."""
    widths = [max((layer.weight.shape[1] for layer in unit.layers if layer.split), default=0) for unit in units]
    split = max(range(len(units)), key=lambda i: (widths[i], i))
    middle = next(i for i, unit in enumerate(units) if unit.name.startswith("mid_block.resnets"))
    attention = max(i for i, unit in enumerate(units) if unit.matmuls)
    return {"split resnet": split, "mid resnet": middle, "attention": attention}


def caching(bench: Bench) -> Iterator[Row]:
    """Time the two passes that collect inputs and targets of every unit, per unit."""
    units = [(unit.name, unit.module) for unit in bench.network.units("block")]

    def run(_batch: int) -> torch.Tensor:
        return forward(bench.network, bench.x[:BATCH], bench.timestep[:BATCH])

    def walk() -> None:
        with PausedPasses(run, 1, units) as full, PausedPasses(run, 1, units) as quantized:
            for index in range(len(units)):
                bench.network.set_state(weights=False, activations=False)
                full.inputs(index), full.outputs(index)
                bench.network.set_state(weights=True, activations=True)
                quantized.inputs(index)

    pairs = bench.pairs().repeat(walk, bench.repeats)
    yield bench.row("caching inputs and targets of one unit, 32 rows", pairs, parts=len(units))


def tdac(bench: Bench, steps: int = 100, trajectories: int = 64) -> Iterator[Row]:
    """Time the TDAC scores of features (steps, trajectories, 64, 4, 4) that drift along the trajectory.

    The double loop is the official amount of work, done here: where its ratio is not the official one, this machine's
    forward pass is worth more or less than that of golden README 15, and the two columns compare only by that factor.
    """
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(steps, trajectories, 64, 4, 4, generator=generator).mul_(0.5).cumsum_(0)
    pairs = bench.pairs().repeat(lambda: shares(density(features, 3.0)[0], variety(features), 1.2), bench.repeats)
    yield bench.row(f"TDAC scores, {steps} steps x {trajectories} trajectories", pairs)
    first = min(YARDSTICK_STEPS, steps)
    pairs = bench.pairs().repeat(lambda: _double_loop(features, first), bench.repeats)
    yield bench.row(YARDSTICK, pairs, parts=first / steps)


def _double_loop(features: torch.Tensor, steps: int) -> None:
    """Compute distance and summed cosine distance of the first steps to all others, pair by pair."""
    for i in range(steps):
        for j in range(len(features)):
            if i != j:
                (features[i] - features[j]).square().mean().item()
                (1 - torch.cosine_similarity(features[i], features[j], dim=1, eps=1e-6)).sum().item()


GROUPS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "forward": forwards,
    "ranges": ranges,
    "iteration": iterations,
    "caching": caching,
    "tdac": tdac,
}


def embedded_step(
    device: torch.device, clock: Callable[[], float], repeats: int, batch: int = 64
) -> tuple[list[Row], list[float]]:
    """Time a sampling step of ``cifar10_tiny``; return the row and images per second, float and quantized."""
    from edadm.tasks.cifar10_tiny import cifar10_tiny

    bench = prepare(cifar10_tiny().denoiser(), device, clock, repeats, rows=RANGE_BATCH)
    bench.network.set_state(weights=True, activations=True)
    sampler = Sampler()
    x = torch.randn(batch, *bench.x.shape[1:], generator=torch.Generator().manual_seed(1)).to(device)
    t, t_next = sampler.pairs[sampler.steps // 2]
    timesteps = torch.full((batch,), t, device=device)

    def step(network: nn.Module) -> None:
        sampler.step(x, forward(network, x, timesteps), t, t_next)

    pairs = Pairs(lambda: step(bench.full), clock).repeat(lambda: step(bench.network), 3 * repeats)
    row = Row.of(f"fake-quantized step, W4A8, batch {batch}", pairs, target="1.15")
    return [row], [batch / sampler.steps / min(seconds) for seconds in (pairs.references, pairs.seconds)]

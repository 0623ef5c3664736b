"""Quantize the structure of Stable Diffusion v1.4 at its real size: ``python -m benchmarks.stable_diffusion``.

859.5 M random weights at W4A8 as ``task=coco_sd14 method=edadm`` quantizes them: weight ranges, activation ranges, FBR,
save, load, a fake-quantized forward pass at 64 x 64 latents and one step of PLMS. What is small is the work, not the
network: one unguided row at 32 x 32 latents and two iterations a unit. It proves that the paper's largest model goes
through within 24 GiB of memory, and says nothing of quality. Minutes on one core; seconds and peak memory of each stage
go to ``<results>/benchmarks/stable_diffusion-<date>.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import resource
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import records
from edadm import config
from edadm.errors import EdadmError
from edadm.keys import ROWS_PER_PASS, Run
from edadm.parts import build_part
from edadm.progress import Meter, Progress, duration
from edadm.quant import io
from edadm.quant.calibrate import set_activation_ranges, set_weight_ranges
from edadm.quant.network import QuantModel
from edadm.reconstruction.cache import PLACES, Cache
from edadm.reconstruction.memory import Need, Plan, measure, need_at
from edadm.reconstruction.random import seeded
from edadm.reconstruction.reconstruct import reconstruct
from edadm.records import BENCHMARKS, provenance
from edadm.sampling.interface import times
from edadm.store import Store, write_atomically
from edadm.tasks.compvis_unet import SD_V1, UNetParams, unet_config
from edadm.tasks.model_folder import empty_model

SCHEMA = 1
TASK = "stable_diffusion"
TOKENS = 77  # of a prompt
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Stage:
    """Seconds of a stage, the peak of the process's resident memory in it, and what is held when it has ended."""

    seconds: float
    peak_memory_mib: float
    held_mib: float


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run every stage, print and write the record, and return its path."""
    options = parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("edadm.reconstruction").setLevel(logging.WARNING)
    resource.setrlimit(resource.RLIMIT_AS, (int(options.memory_limit * 2**30), resource.RLIM_INFINITY))
    with records.one_setting(options.threads) as load, tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        made = measure_stages(options, Path(scratch))
    made |= {"load": [list(load), list(os.getloadavg())], "provenance": provenance("cpu"), "schema": SCHEMA}
    date = made["provenance"]["date"].partition("+")[0].replace(":", "-")
    path = Path(options.results) / BENCHMARKS / f"{TASK}-{date}.json"
    write_atomically(path, json.dumps(made, indent=1) + "\n")
    print(f"{table(made)}\nRecord: {path}")
    return path


def table(made: dict[str, Any]) -> str:
    """Return the stages of a record as a Markdown table."""
    lines = ["| stage | seconds | peak MiB |", "|---|---:|---:|"]
    for name, stage in made["stages"].items():
        lines.append(f"| {name} | {stage['seconds']:.0f} | {stage['peak_memory_mib']:.0f} |")
    return "\n".join([*lines, f"| all | {made['seconds']:.0f} | {made['peak_memory_mib']:.0f} |"])


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.stable_diffusion", description=__doc__.split("\n")[0])
    result.add_argument("--latent", type=int, default=32, help="side of the latents that calibrate")
    result.add_argument("--forward", type=int, default=64, help="side of the latents of the forward pass and the step")
    result.add_argument("--rows", type=int, default=1, help="calibration rows, without guidance")
    result.add_argument("--iterations", type=int, default=2, help="of each unit")
    result.add_argument("--cache", choices=PLACES, default="device", help="where inputs and targets lie")
    result.add_argument("--threads", type=int, default=1, help="threads of torch")
    result.add_argument("--memory-limit", type=float, default=24.0, help="GiB of address space (default %(default)s)")
    result.add_argument("--scratch", type=Path, default=None, help="folder of the saved network while it runs")
    result.add_argument("--results", type=Path, default=Path("results/local"), help="folder of results")
    return result


def measure_stages(options: argparse.Namespace, folder: Path, params: UNetParams = SD_V1) -> dict[str, Any]:
    """Return the record of all stages, without the machine. Raises EdadmError when the loaded network differs."""
    run = run_of(options)
    assert run.optimizer is not None
    stages: dict[str, Stage] = {}
    rows = _rows(params, options.rows, options.latent)
    large = _rows(params, 1, options.forward)

    with _stage("build", stages):
        network = QuantModel.wrap(random_network(params), run.bits, run.plan)
    parameters = sum(parameter.numel() for parameter in network.model.parameters())
    estimate = _need(run, network, rows, options.cache)
    with _stage("weight ranges", stages):
        set_weight_ranges(network, run.ranges)
    with _stage("activation ranges", stages):
        set_activation_ranges(network, run.ranges, [lambda: network(*rows)])
    with _stage("reconstruction", stages), Progress(run.settings.label) as progress:
        reports = reconstruct(
            network, rows, run.optimizer, "fbr", seeded(0),
            rows_per_pass=ROWS_PER_PASS, cache=Cache(options.cache, folder / "cache"), progress=progress,
        )  # fmt: skip
    with _stage("save", stages):
        io.save(network, folder / "network", task=TASK, method="edadm")
    expected, sites = _noise(network, rows), len(network.sites())
    del network
    with _stage("load", stages):
        network = io.load(folder / "network")
    if not torch.equal(_noise(network, rows), expected):
        raise EdadmError("the loaded network differs from the one that was saved")
    with _stage(f"forward at {options.forward} x {options.forward}", stages):
        _noise(network, large)
    with _stage("sampling step", stages):
        _step(run, network, large)
    return {
        "task": TASK,
        "title": "The structure of Stable Diffusion v1.4 with random weights, EDA-DM at W4A8",
        "parameters": parameters,
        "settings": list(run.settings.overrides),
        "latent": [params.in_channels, options.latent, options.latent],
        "latent_forward": [params.in_channels, options.forward, options.forward],
        "cache": options.cache,
        "units": len(reports),
        "sites": sites,
        "loaded_equals_saved": True,
        "saved_mib": sum(file.stat().st_size for file in (folder / "network").iterdir()) / MIB,
        "stages": {name: dataclasses.asdict(stage) for name, stage in stages.items()},
        "seconds": sum(stage.seconds for stage in stages.values()),
        "peak_memory_mib": max(stage.peak_memory_mib for stage in stages.values()),
        "memory_limit_gib": options.memory_limit,
        "estimate": {
            "largest_unit": estimate.largest,
            "cached_mib": estimate.cached[estimate.largest] / MIB,
            "waiting_mib": estimate.waiting / MIB,
            "peak_memory_mib": estimate.peaks["device"] / MIB,
        },
    }


def run_of(options: argparse.Namespace) -> Run:
    """Return the run of EDA-DM on Stable Diffusion with as little work as asked for; its task is given no weights."""
    words = [
        "task=coco_sd14", "method=edadm", "bits=w4a8", "sampler.guidance_scale=1", f"profile.rows={options.rows}",
        f"profile.batch={options.rows}", f"profile.iterations={options.iterations}", "profile.range_batches=1",
        f"threads={options.threads}", "device=cpu",
    ]  # fmt: skip
    settings = config.settings(config.compose(words), words)
    return Run(settings, build_part(settings["task"]), Store(), "cpu", options.threads)


@torch.no_grad()
def random_network(params: UNetParams) -> nn.Module:
    """Return the UNet with small random weights, its norms near one."""
    network = empty_model(*unet_config(params)).to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.normal_(generator=generator).mul_(parameter[0].numel() ** -0.5)
        else:
            parameter.normal_(generator=generator).mul_(0.1)
    for module in network.modules():
        if isinstance(module, nn.GroupNorm | nn.LayerNorm):
            module.weight.add_(1)
    return network


def _rows(params: UNetParams, rows: int, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return latents, times and embedded prompts as the network takes them."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, params.in_channels, side, side, generator=generator)
    assert params.context_dim is not None
    context = torch.randn(rows, TOKENS, params.context_dim, generator=generator)
    return x, torch.linspace(1, 981, rows).long(), context


@torch.no_grad()
def _noise(network: QuantModel, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    return network(*rows, return_dict=False)[0]


@torch.no_grad()
def _step(run: Run, network: QuantModel, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return x after the first network call and update of the run's sampler."""
    x, _, context = rows
    t = run.sampler.timesteps[0]
    eps = _noise(network, (x, times(t, len(x), x.device), context))
    moved = run.sampler.update(None)(0, x, run.sampler.converted(t, x, eps), None)
    if not torch.isfinite(moved).all():
        raise EdadmError("the sampling step gave NaN or Inf")
    return moved


def _need(run: Run, network: QuantModel, rows: Sequence[torch.Tensor], place: str) -> Need:
    assert run.optimizer is not None
    plan = Plan(run.optimizer.phases, len(rows[0]), ROWS_PER_PASS, range_rows=len(rows[0]), cpu=True)
    found = need_at(network, measure(network, rows), plan, place)
    print(f"estimate: peak {found.peaks['device'] / MIB:.0f} MiB, largest cache {found.largest}", flush=True)
    return found


@contextmanager
def _stage(name: str, stages: dict[str, Stage]) -> Iterator[None]:
    with Meter() as meter:
        yield
    assert meter.peak_memory_mib is not None
    stages[name] = Stage(meter.seconds, meter.peak_memory_mib, _held())
    print(f"{name}: {duration(meter.seconds)}, peak {meter.peak_memory_mib:.0f} MiB", flush=True)


def _held() -> float:
    """Return the resident memory of this process in MiB, 0 where it is not known."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / MIB


if __name__ == "__main__":
    main()

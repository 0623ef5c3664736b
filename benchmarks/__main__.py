"""Measure what quantization costs, in forward passes of the network it quantizes, and keep a record of it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import records
from benchmarks.limits import limits as limits_of_operations
from benchmarks.operations import (
    BATCH,
    GROUPS,
    OFFICIAL_UNIT,
    RANGE_ROWS,
    embedded_step,
    golden_folder,
    prepare,
    small_network,
)
from benchmarks.records import Benchmark, Load
from benchmarks.timing import clock

DEFAULT_RESULTS = Path("results/local")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a Markdown table for each task and write its record."""
    options = parser().parse_args(arguments)
    on_gpu = torch.device(options.device).type != "cpu"
    for task in (task for task in options.task if not (on_gpu and task == "limits")):  # it looks at calls on the CPU
        with records.one_setting(options.threads) as load:
            made = TASKS[task](options, torch.device(options.device), load)
        print(f"{made}\n\nRecord: {records.write(made, options.results)}\n")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    result.add_argument("--task", choices=tuple(TASKS), nargs="+", default=list(TASKS), help="networks to work on")
    result.add_argument("--only", choices=tuple(GROUPS), nargs="+", default=list(GROUPS), help="groups of operations")
    result.add_argument("--repeats", type=int, default=5, help="measurements of a slow operation; fast ones get more")
    result.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    result.add_argument("--device", default="cpu", help="cpu or cuda")
    result.add_argument("--results", type=Path, default=DEFAULT_RESULTS, help="folder of results (default %(default)s)")
    return result


def golden(options: argparse.Namespace, device: torch.device, load: Load) -> Benchmark:
    """Measure the operations of golden README 15."""
    source = "official weights" if golden_folder() else "random weights: no golden vectors found"
    bench = prepare(small_network(), device, clock(device, options.threads), options.repeats, RANGE_ROWS)
    rows = [row for name in options.only for row in GROUPS[name](bench)]
    return records.benchmark(
        "golden",
        f"Small network of golden README 15 ({source}). The official ratios were measured where the unit took "
        f"{OFFICIAL_UNIT}. Before comparing, see how far the yardstick's ratio, the same work done here, is from its "
        "official one.",
        f"one full-precision forward pass at batch {BATCH}",
        rows,
        device,
        options.threads,
        load,
    )


def embedded(options: argparse.Namespace, device: torch.device, load: Load) -> Benchmark:
    """Measure a sampling step of the embedded task."""
    rows, (full, quantized) = embedded_step(device, clock(device, options.threads), options.repeats)
    rates = {"full precision": full, "fake-quantized": quantized}
    return records.benchmark(
        "cifar10_tiny",
        "Embedded task, one sampling step.",
        "the full-precision step",
        rows,
        device,
        options.threads,
        load,
        {f"best images per second of the clock below, 20 steps, {name}": rate for name, rate in rates.items()},
    )


def limits(options: argparse.Namespace, device: torch.device, load: Load) -> Benchmark:
    """Say what limits the operations on the embedded network."""
    return records.benchmark(
        "limits",
        f"What limits the operations on the embedded network at batch {BATCH}, on the CPU.",
        "shares of an operation's time; rate: of the large product's",
        [],
        device,
        options.threads,
        load,
        limits_of_operations(),
        clock="wall clock",
    )


TASKS: dict[str, Callable[[argparse.Namespace, torch.device, Load], Benchmark]] = {
    "golden": golden,
    "cifar10_tiny": embedded,
    "limits": limits,
}

if __name__ == "__main__":
    main()

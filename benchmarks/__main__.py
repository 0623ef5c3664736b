"""Measure what quantization costs, in forward passes of the network it quantizes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

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
from benchmarks.timing import Row, clock, machine, markdown, peak_mebibytes


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a Markdown table."""
    options = parser().parse_args(arguments)
    device, before = torch.device(options.device), torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        print(embedded(options, device) if options.task == "cifar10_tiny" else golden(options, device))
    finally:
        torch.set_num_threads(before)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    result.add_argument("--task", choices=("golden", "cifar10_tiny"), default="golden", help="network to work on")
    result.add_argument("--only", choices=tuple(GROUPS), nargs="+", default=list(GROUPS), help="groups of operations")
    result.add_argument("--repeats", type=int, default=5, help="measurements of a slow operation; fast ones get more")
    result.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    result.add_argument("--device", default="cpu", help="cpu or cuda")
    return result


def golden(options: argparse.Namespace, device: torch.device) -> str:
    """Return the table of golden README 15."""
    source = "official weights" if golden_folder() else "random weights: no golden vectors found"
    bench = prepare(small_network(), device, clock(device, options.threads), options.repeats, RANGE_ROWS)
    rows = [row for name in options.only for row in GROUPS[name](bench)]
    return _report(
        rows,
        f"Small network of golden README 15 ({source}). Unit: one full-precision forward pass at batch {BATCH}. "
        f"The official ratios were measured where this unit took {OFFICIAL_UNIT}. Before comparing, see how far the "
        "yardstick's ratio, the same work done here, is from its official one.",
        options,
        device,
    )


def embedded(options: argparse.Namespace, device: torch.device) -> str:
    """Return the table of a sampling step of the embedded task."""
    rows, (full, quantized) = embedded_step(device, clock(device, options.threads), options.repeats)
    return _report(
        rows,
        "Embedded task, unit: the full-precision step. Best images per second (of the clock below) with 20 steps: "
        f"{full:.3g} in full precision, {quantized:.3g} fake-quantized.",
        options,
        device,
    )


def _report(rows: list[Row], title: str, options: argparse.Namespace, device: torch.device) -> str:
    memory = f"Peak memory {peak_mebibytes(device):.0f} MiB."
    return f"{title}\n{machine(device, options.threads)}. {memory}\n\n{markdown(rows)}"


if __name__ == "__main__":
    main()

"""What limits the operations that take longest: arithmetic, passes over memory, or calls.

Convolutions and matrix products do arithmetic; their rate stands beside that of a large matrix product, which is about
what a core can do. Everything else (rounding, normalisation, activations, copies) does a few operations a number and
waits for memory. A call costs at least what the same call costs on a single number.
"""

from __future__ import annotations

import itertools
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.operations import BATCH, Bench, forward, joint, prepare, reconstruct_unit, units_to_time

ARITHMETIC = ("convolution", "mm", "scaled_dot_product")
ITERATIONS = 4  # watched in one go, after a first one
SHARE, RATE, MEMORY, DISPATCH = "arithmetic", "rate", "memory", "dispatch"
PRODUCT = "GFLOP/s of a product of two matrices of 1,024 rows and columns"

Watched = Callable[[AbstractContextManager], None]
"""Does an operation, its main part inside the context."""


@dataclass(frozen=True)
class Spent:
    """Seconds of an operation, those of them in arithmetic, its calls, and its floating-point operations."""

    seconds: float
    arithmetic: float
    calls: int
    flop: int


def limits() -> dict[str, float]:
    """Return for each operation on the embedded network the share of the time in arithmetic, in passes over memory and
    in calls, and the rate of the arithmetic as a share of a large product's, by ``<operation>: <name>``."""
    from edadm.tasks.cifar10_tiny import cifar10_tiny

    bench = prepare(cifar10_tiny().denoiser(), torch.device("cpu"), time.perf_counter, repeats=1, rows=BATCH)
    best, call = product_rate(), call_seconds()
    found = {PRODUCT: best / 1e9}
    for name, watched in operations(bench):
        used = spent(watched)
        dispatch = used.calls * call
        shares = {
            SHARE: used.arithmetic / used.seconds,
            RATE: used.flop / used.arithmetic / best,
            MEMORY: 1 - (used.arithmetic + dispatch) / used.seconds,
            DISPATCH: dispatch / used.seconds,
        }
        found |= {f"{name}: {what}": value for what, value in shares.items()}
    return found


def operations(bench: Bench) -> Iterator[tuple[str, Watched]]:
    """Yield the operations by name."""
    bench.network.set_state(weights=True, activations=True)
    x, timestep = bench.x[:BATCH], bench.timestep[:BATCH]
    yield "full-precision step", partial(_once, partial(forward, bench.full, x, timestep))
    yield "fake-quantized step", partial(_once, partial(forward, bench.network, x, timestep))
    yield "FBR iteration, split resnet", partial(_iterations, bench)


def _once(run: Callable[[], object], watch: AbstractContextManager) -> None:
    run()
    with watch:
        run()


def _iterations(bench: Bench, watch: AbstractContextManager) -> None:
    looks = itertools.count()

    def observe(step: object) -> None:
        look = next(looks)
        if look == 1:
            watch.__enter__()
        elif look == 1 + ITERATIONS:
            watch.__exit__(None, None, None)

    index = units_to_time(bench.network.units("block"))["split resnet"]
    reconstruct_unit(bench, index, "fbr", joint(ITERATIONS + 2), observe)


def spent(watched: Watched) -> Spent:
    """Do an operation twice, once to see where its time goes and once to count, which would slow it down."""
    seen, counter = profile(activities=[ProfilerActivity.CPU]), counter_of_operations()
    watched(seen)
    watched(counter)
    events = [event for event in seen.key_averages() if event.key.startswith("aten::")]
    arithmetic = [event for event in events if any(part in event.key for part in ARITHMETIC)]
    return Spent(
        sum(event.self_cpu_time_total for event in events) / 1e6,
        sum(event.self_cpu_time_total for event in arithmetic) / 1e6,
        sum(event.count for event in events),
        counter.get_total_flops(),
    )


def counter_of_operations() -> FlopCounterMode:
    """Return a counter that knows the attention of the CPU too, which torch's leaves out."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def count(q: torch.Size, k: torch.Size, v: torch.Size, *others: object, **out: object) -> int:
        return sdpa_flop_count(q, k, v)

    return FlopCounterMode(display=False, custom_mapping={attention: count})


def product_rate(size: int = 1024, times: int = 5) -> float:
    """Return the floating-point operations a second of the fastest of some products of two square matrices."""
    a, b = torch.ones(size, size), torch.ones(size, size)
    return 2 * size**3 / min(timeit.repeat(lambda: a @ b, number=1, repeat=times + 1))


def call_seconds(times: int = 2000) -> float:
    """Return the seconds of a call that does nothing but add two numbers in place."""
    a, b = torch.ones(1), torch.ones(1)
    return min(timeit.repeat(lambda: a.add_(b), number=times)) / times

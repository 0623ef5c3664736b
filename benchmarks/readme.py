"""Render the README's benchmark block from the newest committed records: ``python -m benchmarks.readme``."""

from __future__ import annotations

import textwrap
from pathlib import Path

from benchmarks import records
from benchmarks.limits import DISPATCH, MEMORY, PRODUCT, RATE, SHARE
from benchmarks.operations import BATCH, KNOWN, YARDSTICK
from benchmarks.records import Benchmark
from benchmarks.timing import Row
from edadm.report.page import with_block

ROOT = Path(__file__).resolve().parent.parent
COMMITTED = ROOT / "results" / "cost"
COMMAND = "make bench RESULTS=results/cost"
BLOCK = "benchmark"


def block(results: Path = COMMITTED) -> str:
    """Return the text between the markers, of the newest records in a results folder."""
    found = [records.newest(results, task) for task in RENDERED]
    if not all(found):
        return f"What quantization costs has no record yet: `{COMMAND}` on an idle machine makes one.\n"
    return "\n\n".join(render(*one) for render, one in zip(RENDERED.values(), found, strict=True)) + "\n"


def _golden(path: Path, made: Benchmark) -> str:
    head = (
        f"What quantization costs, in full-precision forward passes at batch {BATCH} of the small network that the "
        "official code was timed on: median and quartiles of n ratios, each to a pass just before it."
    )
    table = ["| operation | here | n | official code |", "|---|---|---|---|"]
    table += [_line(row) for row in made.rows if row.official != "-" and row.operation != YARDSTICK]
    foot = (
        f"{_source(path, made)} It has the iterations of every granularity and optimization. The official ratios come "
        f"from another machine: a plain double loop for the TDAC scores costs {_number(made.row(YARDSTICK).median)} "
        f"passes here and {KNOWN[YARDSTICK].official} there, so take off that factor before comparing."
    )
    return "\n".join([_wrapped(head), "", *table, "", _wrapped(foot)])


def _embedded(path: Path, made: Benchmark) -> str:
    (row,) = made.rows
    return _wrapped(
        f"The fake-quantized step of the embedded network costs {_ratio(row)} full-precision steps "
        f"(n={len(row.ratios)}). {_source(path, made)}"
    )


def _limits(path: Path, made: Benchmark) -> str:
    head = (
        f"What limits them, on the embedded network at batch {BATCH}: shares of the time in convolutions and products, "
        "in everything else, which waits for memory, and at most in the overhead of calls; and the rate of the "
        "arithmetic, as a share of a large matrix product's "
        f"({_number(made.facts[PRODUCT])} GFLOP/s)."
    )
    table = ["| operation | arithmetic | at the rate | memory | calls |", "|---|---|---|---|---|"]
    names = list(dict.fromkeys(fact.rpartition(": ")[0] for fact in made.facts if fact != PRODUCT))
    for name in names:
        shares = (made.facts[f"{name}: {what}"] for what in (SHARE, RATE, MEMORY, DISPATCH))
        table.append(f"| {name} | {' | '.join(f'{share:.0%}' for share in shares)} |")
    gain = 1 / made.facts[f"{names[-1]}: {SHARE}"]
    foot = f"Were all but arithmetic free, the last would be {gain:.2f} times as fast."
    return "\n".join([_wrapped(head), "", *table, "", _wrapped(f"{foot} {_source(path, made)}")])


def _line(row: Row) -> str:
    return f"| {row.operation} | {_ratio(row)} | {len(row.ratios)} | {row.official.replace('-', '–')} |"


def _ratio(row: Row) -> str:
    low, high = map(_number, row.quartiles)
    return f"{_number(row.median)} [{low}, {high}]"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"


def _source(path: Path, made: Benchmark) -> str:
    return f"Measured on {made.machine} (`{COMMAND}`, record `results/cost/{path.parent.name}/{path.name}`)."


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


RENDERED = {"golden": _golden, "cifar10_tiny": _embedded, "limits": _limits}
"""The tasks of the benchmark, and how each is rendered."""


def main() -> None:
    """Write the block into the README of the checkout."""
    path = ROOT / "README.md"
    path.write_text(with_block(path.read_text(encoding="utf-8"), BLOCK, block()), encoding="utf-8")


if __name__ == "__main__":
    main()

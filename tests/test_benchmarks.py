"""Every benchmark runs once at a small size and fills its lines of the table; nothing here looks at time."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

import benchmarks.__main__ as command
from benchmarks import limits
from benchmarks.operations import CONFIG, GROUPS, KNOWN, RANGE_ROWS, Bench, embedded_step, prepare, units_to_time
from benchmarks.records import newest
from benchmarks.timing import HEADER, Pairs, Row, markdown

pytestmark = pytest.mark.slow


def narrow_network():
    from diffusers import UNet2DModel

    return UNet2DModel(**CONFIG | {"block_out_channels": (8, 16, 16), "norm_num_groups": 8})


@pytest.fixture(scope="module")
def bench() -> Bench:
    return prepare(narrow_network(), torch.device("cpu"), time.process_time, repeats=1, rows=RANGE_ROWS)


@pytest.fixture(scope="module")
def rows(bench: Bench) -> dict[str, list[Row]]:
    return {name: list(measure(bench)) for name, measure in GROUPS.items()}


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_each_group_gives_lines_of_the_table(rows):
    for group in rows.values():
        head, rule, *body = cells(markdown(group))
        assert tuple(head) == HEADER and len(rule) == len(HEADER)
        assert len(body) == len(group) > 0
        assert all(len(line) == len(HEADER) and all(line) for line in body)


def test_each_known_cost_stands_beside_a_measured_operation(rows):
    measured = {row.operation: row for group in rows.values() for row in group}
    assert len(measured) == sum(map(len, rows.values()))
    for operation, known in KNOWN.items():
        assert (measured[operation].official, measured[operation].target) == (known.official, known.target)


def test_timed_units_are_those_of_the_golden_readme(bench):
    units = bench.network.units("block")
    names = {kind: units[index].name for kind, index in units_to_time(units).items()}
    assert names == {
        "split resnet": "up_blocks.1.resnets.1",
        "mid resnet": "mid_block.resnets.0",
        "attention": "up_blocks.1.attentions.2",
    }


def test_ratios_are_paired_and_scaled_to_the_whole_work():
    pairs = Pairs(lambda: None, time.process_time, seconds=[2.0, 3.0, 8.0], references=[1.0, 1.0, 2.0])
    assert Row.of("a", pairs).ratios == [2.0, 3.0, 4.0]
    half = Row.of("a", pairs, parts=0.5)
    assert (half.median, half.quartiles, half.least_seconds) == (6.0, (5.0, 7.0), 4.0)
    assert Row("a", (3.0,), (2.0,)).quartiles == (1.5, 1.5)


def test_an_operation_under_way_has_no_ratio_yet():
    pairs = Pairs(lambda: None, itertools.count(1.0).__next__)
    pairs.next()
    pairs.next()
    assert (len(pairs.references), len(Row.of("a", pairs).ratios)) == (2, 1)


def test_command_prints_what_was_measured_and_keeps_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(command, "small_network", narrow_network)
    threads = torch.get_num_threads()
    command.main(["--task", "golden", "--only", "caching", "--repeats", "2", "--results", str(tmp_path)])
    title, machine, blank, *table, space, record, _ = capsys.readouterr().out.splitlines()
    assert "yardstick" in title and "MiB" in machine and "load" in machine and not blank and not space
    assert len(cells("\n".join(table))) == 3
    assert torch.get_num_threads() == threads
    path, made = newest(tmp_path, "golden")
    assert record == f"Record: {path}"
    (row,) = made.rows
    assert len(row.seconds) == len(row.references) == 2 and made.peak_memory_mib > 0
    assert made.provenance["libraries"]["torch"] in torch.__version__


def test_time_is_spent_where_the_work_is(bench):
    found = {name: limits.spent(watched) for name, watched in limits.operations(bench)}
    assert len(found) == 3
    for used in found.values():
        assert 0 < used.arithmetic < used.seconds and used.calls > 0
    full, quantized = found["full-precision step"], found["fake-quantized step"]
    assert quantized.flop == full.flop and quantized.calls > full.calls


def test_attention_of_the_cpu_is_counted():
    q = torch.ones(2, 3, 5, 8)
    with limits.counter_of_operations() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert counter.get_total_flops() == 2 * (2 * 2 * 3 * 5 * 5 * 8)


def test_products_and_calls_take_time():
    assert limits.product_rate(64, 1) > 1e6
    assert 0 < limits.call_seconds(10) < 1


def test_embedded_step_is_one_line_and_two_rates():
    rows, rates = embedded_step(torch.device("cpu"), time.process_time, repeats=1, batch=2)
    assert len(cells(markdown(rows))) == 3 and len(rates) == 2

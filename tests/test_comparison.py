from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edadm.comparison import (
    Difference,
    Draws,
    MetricDraws,
    deciding_design,
    difference,
    draws_path,
    newest_by_seed,
    no_difference,
    read_all_draws,
    read_draws,
    write_draws,
)
from edadm.errors import EdadmError
from edadm.records import Record, path_of, read_all, write
from tests.report.records_for_tests import metric, record

T_199, T_2 = 1.971957, 4.302653  # 97.5 % quantiles of Student's t


def run(method: str, seed: int, value: float | None, **fields: object) -> Record:
    return record(method, seed, metrics={"x": metric(value, True)}, **fields)


def drawn(run: Record, draws: list[float], n: int = 1000, **fields: object) -> Draws:
    values = MetricDraws(run.metrics["x"]["value"], n, 1, tuple(draws))
    return Draws(**({"hash": run.hash, "task": run.task, "seed": 0, "version": 1, "metrics": {"x": values}} | fields))


def by_hash(*draws: Draws) -> dict[str, Draws]:
    return {one.hash: one for one in draws}


def made(**fields: object) -> Difference:
    given = {"value": 1.0, "n": 1000, "seeds": (0, 1, 2), "image_error": 0.1, "seed_deviation": 0.3}
    return Difference(**(given | {"bias": 0.0, "level": 10.0, "resamples": 200} | fields))


def test_a_difference_of_two_seeds_by_hand() -> None:
    a, b = {0: run("a", 0, 5.0), 1: run("a", 1, 7.0)}, {0: run("b", 0, 4.0), 1: run("b", 1, 4.0)}
    draws = by_hash(
        drawn(a[0], [5.0, 5.2, 4.8]), drawn(b[0], [4.1, 4.0, 3.9]),
        drawn(a[1], [7.1, 7.0, 6.9]), drawn(b[1], [4.0, 4.0, 4.0]),
    )  # fmt: skip
    found = difference(a, b, "x", draws)
    assert found is not None
    assert found.value == pytest.approx(2.0)  # of 1 and 3
    assert found.seed_deviation == pytest.approx(math.sqrt(2))
    # mean over seeds of the differences in each resample: (0.9 + 3.1) / 2, (1.2 + 3.0) / 2, (0.9 + 2.9) / 2
    assert found.image_error == pytest.approx(0.1 * math.sqrt(1000 / 999))
    assert found.bias == pytest.approx(0.0, abs=1e-12)
    assert (found.seeds, found.n, found.level, found.resamples) == ((0, 1), 1000, 4.0, 3)


def test_results_of_two_versions_of_a_metric_have_no_difference() -> None:
    a = [record("a", seed, metrics={"x": metric(1.0, True, version=2)}) for seed in range(2)]
    b = [record("b", seed, metrics={"x": metric(2.0, True, version=2 - seed)}) for seed in range(2)]
    draws = by_hash(*(drawn(one, [1.0, 1.1]) for one in (*a, *b)))
    assert difference({0: a[0]}, {0: b[0]}, "x", draws) is not None
    assert difference(dict(enumerate(a)), dict(enumerate(b)), "x", draws) is None
    why = no_difference(dict(enumerate(a)), dict(enumerate(b)), "x")
    assert why == "x was measured in versions 1, 2: run the older ones again"
    assert no_difference({0: a[0]}, {0: b[0]}, "x") == ""
    assert no_difference({0: a[0]}, {1: b[1]}, "x") == "the sides share no seed"
    assert no_difference({0: a[0]}, {0: b[0]}, "y") == "no seed has y on both sides"


def test_resamples_are_paired_so_what_both_runs_share_cancels() -> None:
    shared = list(np.random.default_rng(0).standard_normal(50))
    a, b = run("a", 0, 5.0), run("b", 0, 4.0)
    draws = by_hash(drawn(a, [5 + x for x in shared]), drawn(b, [4 + x for x in shared]))
    found = difference({0: a}, {0: b}, "x", draws)
    assert found is not None
    assert found.image_error == pytest.approx(0.0, abs=1e-12)
    assert found.sign == 1


def test_the_interval_of_one_seed_covers_images() -> None:
    found = made(seeds=(0,), seed_deviation=None)
    assert found.interval == pytest.approx((1 - T_199 * 0.1, 1 + T_199 * 0.1), rel=1e-5)
    assert (found.covers, found.sign, found.finding) == ("images", 1, 0)


def test_the_interval_of_seeds_adds_both_parts_in_quadrature() -> None:
    found = made()
    half = math.hypot(T_199 * 0.1, T_2 * 0.3 / math.sqrt(3))
    assert found.interval == pytest.approx((1 - half, 1 + half), rel=1e-5)
    assert (found.covers, found.finding) == ("images and seeds", 1)


def test_the_interval_holds_the_value_at_n_and_the_one_without_bias() -> None:
    found = made(value=0.3, bias=0.4, seed_deviation=0.0)
    assert found.interval == pytest.approx((-0.1 - T_199 * 0.1, 0.3 + T_199 * 0.1), rel=1e-5)
    assert made(value=0.3, bias=0.0, seed_deviation=0.0).sign == 1
    assert found.sign == 0


def test_few_trajectories_widen_the_interval() -> None:
    assert made(n=5, seed_deviation=None).half_width == pytest.approx(2.776445 * 0.1, rel=1e-5)  # t with 4 degrees


def test_two_seeds_are_no_finding() -> None:
    found = made(seeds=(0, 1), seed_deviation=0.0)
    assert (found.sign, found.finding) == (1, 0)


def test_equal_runs_do_not_differ() -> None:
    a, b = run("a", 0, 5.0), run("b", 0, 5.0)
    found = difference({0: a}, {0: b}, "x", by_hash(drawn(a, [5.0, 5.5]), drawn(b, [5.0, 5.5])))
    assert found is not None
    assert (found.value, found.interval, found.sign) == (0.0, (0.0, 0.0), 0)


def test_only_seeds_that_both_sides_have_are_compared() -> None:
    a = {0: run("a", 0, 5.0), 1: run("a", 1, 6.0), 2: run("a", 2, None)}
    b = {1: run("b", 1, 4.0), 2: run("b", 2, 4.0)}
    found = difference(a, b, "x", by_hash(drawn(a[1], [6.0, 6.1]), drawn(b[1], [4.0, 4.0])))
    assert found is not None
    assert (found.seeds, found.value) == ((1,), 2.0)
    assert difference({0: a[0]}, b, "x", {}) is None


def test_runs_that_were_not_resampled_alike_have_no_difference() -> None:
    a, b = run("a", 0, 5.0), run("b", 0, 4.0)
    draws = drawn(a, [5.0, 5.1])
    for other in (
        drawn(b, [4.0, 4.1], seed=1),
        drawn(b, [4.0, 4.1], version=2),
        drawn(b, [4.0, 4.1], n=999),
        drawn(b, [4.0, 4.1, 4.2]),
        drawn(b, [4.0, 4.1], metrics={}),
    ):
        assert difference({0: a}, {0: b}, "x", by_hash(draws, other)) is None
    assert difference({0: a}, {0: b}, "x", by_hash(draws)) is None
    assert difference({0: a}, {0: b}, "x", by_hash(draws, drawn(b, [4.0, 4.1]))) is not None


@given(
    st.lists(st.floats(-5, 5), min_size=4, max_size=4),
    st.lists(st.floats(-5, 5), min_size=4, max_size=4),
)
def test_exchanging_the_sides_turns_the_sign(one: list[float], other: list[float]) -> None:
    a, b = run("a", 0, 1.0), run("b", 0, -2.0)
    draws = by_hash(drawn(a, one), drawn(b, other))
    there, back = difference({0: a}, {0: b}, "x", draws), difference({0: b}, {0: a}, "x", draws)
    assert there is not None and back is not None
    assert there.value == -back.value
    assert there.interval == pytest.approx(tuple(-end for end in reversed(back.interval)), abs=1e-9)
    low, high = there.interval
    assert low <= there.value <= high


def simulated(rng: np.random.Generator, n: int, seeds: int, by_seed: float, by_both: float) -> Difference:
    """Two equal methods: their images differ by image, by seed, and by image and seed."""
    counts = rng.multinomial(n, np.full(n, 1 / n), size=100)
    image = rng.standard_normal(n)
    runs, draws = {"a": {}, "b": {}}, {}
    for seed in range(seeds):
        for method in runs:
            shared = image if method == "a" else 0  # in the difference only
            values = shared + by_seed * rng.standard_normal() + by_both * rng.standard_normal(n)
            one = run(method, seed, float(values.mean()))
            runs[method][seed] = one
            draws[one.hash] = drawn(one, list(counts @ values / n), n)
    found = difference(runs["a"], runs["b"], "x", draws)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("seeds", "by_seed", "by_both"),
    [(1, 0.0, 1.0), (3, 0.0, 1.0), (3, 0.1, 0.5), (3, 1.0, 0.0)],
    ids=["images", "images, three seeds", "both", "seeds"],
)
def test_the_interval_of_equal_methods_covers_zero_in_95_of_100_experiments(
    seeds: int, by_seed: float, by_both: float
) -> None:
    rng = np.random.default_rng(5)
    trials = 120
    covered = sum(simulated(rng, 60, seeds, by_seed, by_both).sign == 0 for _ in range(trials))
    # 95 % or a little more: by chance below 0.89 with a probability under 1 %
    assert covered >= 0.89 * trials


def test_seeds_alone_or_images_alone_would_cover_too_little() -> None:
    """Why the interval has two parts: the images are common to all seeds, so seeds do not show their share."""
    rng = np.random.default_rng(6)
    found = [simulated(rng, 60, 3, 0.05, 0.0) for _ in range(120)]
    by_seeds = [abs(one.value) <= T_2 * one.seed_deviation / math.sqrt(3) for one in found]
    assert np.mean(by_seeds) < 0.8
    found = [simulated(rng, 60, 3, 1.0, 0.0) for _ in range(120)]
    by_images = [abs(one.value) <= 2 * one.image_error for one in found]
    assert np.mean(by_images) < 0.6


def test_a_deciding_number_of_seeds_by_hand() -> None:
    # the measured 1.0 must exceed half of the interval and 0.842 standard errors:
    # 4 seeds: t(3) = 3.182, (3.182 + 0.842) * 0.6 / 2 = 1.207; 5 seeds: t(4) = 2.776, 3.618 * 0.6 / sqrt(5) = 0.971
    design = deciding_design(made(image_error=0.0, seed_deviation=0.6))
    assert design is not None
    assert design.seeds == 5


def test_a_deciding_number_of_images_by_hand() -> None:
    # (1.972 + 0.842) * 0.7 = 1.970 at n, so the error must fall by 1.970 and images grow by 3.88: 3,880 of 1,000
    design = deciding_design(made(image_error=0.7, seed_deviation=0.0))
    assert design is not None
    assert (design.seeds, design.images) == (None, 4000)
    assert str(design) == "4,000 images"


def test_a_design_asks_for_more_of_both_where_neither_suffices() -> None:
    design = deciding_design(made(image_error=0.6, seed_deviation=2.0))
    assert design is not None
    assert (design.seeds, design.images) == (None, None)
    assert design.both and str(design) == f"{design.both} times as many seeds and images"
    assert str(deciding_design(made(value=0.0))).startswith("none within reach")
    assert deciding_design(made(seeds=(0,), seed_deviation=None)) is None


def test_a_decided_difference_needs_no_more_than_it_has() -> None:
    design = deciding_design(made(value=50.0))
    assert design is not None
    assert design.seeds == 3


def test_a_design_can_aim_at_a_margin() -> None:
    found = made(value=0.0, image_error=0.0, seed_deviation=0.6)
    design = deciding_design(found, target=-1.0)
    assert design is not None
    assert design.seeds == 5  # as for a difference of 1


def test_of_two_records_of_a_seed_the_newest_finished_one_counts() -> None:
    old = record(fd=1.0, hash="1" * 16, provenance={"date": "2026-01-01"})
    new = record(fd=2.0, hash="0" * 16, provenance={"date": "2026-02-01"})
    failed = record(status="failed", reason="x", hash="2" * 16, provenance={"date": "2026-03-01"})
    assert newest_by_seed([new, failed, old]) == {0: new}


def test_draws_lie_beside_records_and_are_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = run("a", 0, 5.0)
    write(one, tmp_path)
    path = write_draws(drawn(one, [1 / 3, 2.0]), tmp_path)
    assert path == draws_path(path_of(tmp_path, "toy", one.hash))
    assert read_draws(path).metrics["x"].draws == (0.3333333, 2.0)
    assert read_all_draws([tmp_path]) == {one.hash: read_draws(path)}
    assert read_all([tmp_path]) == [one]
    assert not caplog.records


def test_broken_draws_are_skipped_with_their_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, other = run("a", 0, 5.0), run("b", 0, 5.0)
    write_draws(drawn(one, [5.0, 5.1]), tmp_path)
    path = write_draws(drawn(other, [5.0, 5.1]), tmp_path)
    path.write_text('{"schema": 1}')
    assert set(read_all_draws([tmp_path])) == {one.hash}
    assert str(path) in caplog.text
    path.write_text(path.read_text().replace("1", "99"))
    with pytest.raises(EdadmError, match="update edadm"):
        read_draws(path)


def test_draws_come_back_as_they_were_written(tmp_path: Path) -> None:
    one = run("a", 0, 5.0)
    draws = dataclasses.replace(drawn(one, [0.25, -4.5]), provenance={"date": "2026-11-21"})
    assert read_draws(write_draws(draws, tmp_path)) == draws

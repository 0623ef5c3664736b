"""The fast search must pick what the full search picks, whatever the data."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edadm.quant import range_search
from edadm.quant.range_search import search, symmetric_bounds
from edadm.quant.ranges import MSE, qparams


def full_search(rows, scales, zero_points, levels, exponent):
    """Every candidate on every element, as the released code does; first strict minimum."""
    best = torch.full((len(rows),), torch.inf)
    index = torch.zeros(len(rows), dtype=torch.int64)
    for k, (scale, zero_point) in enumerate(zip(scales.T[:, :, None], zero_points.T[:, :, None], strict=True)):
        q = (torch.clamp(torch.round(rows / scale) + zero_point, 0, levels - 1) - zero_point) * scale
        score = (rows - q).abs().pow(exponent).mean(1)
        index[score < best] = k
        best = torch.minimum(score, best)
    return index


def candidates(rows, levels, side, count=100, mid_zero_point=False):
    radius = rows.abs().amax(1)
    t = radius[:, None] / count * torch.arange(1, count + 1, dtype=torch.float32)
    zero = torch.zeros_like(t)
    scales, zero_points = qparams(zero if side == "positive" else -t, zero if side == "negative" else t, levels)
    if mid_zero_point and side == "both":
        zero_points = torch.full_like(zero_points, levels // 2)
    return radius, scales, zero_points


def side_of(rows):
    return "positive" if rows.min() >= 0 else "negative" if rows.max() <= 0 else "both"


def draw_rows(kind: str, channels: int, n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(channels, n, generator=generator)
    spread = torch.rand(channels, 1, generator=generator).mul(12).sub(6).exp()
    uniform = torch.rand(channels, n, generator=generator)
    kinds = {
        "normal": lambda: normal,
        "heavy tail": lambda: normal / uniform.clamp(min=1e-4),
        "one outlier": lambda: torch.where(torch.arange(n) == 0, normal.abs().amax(1, keepdim=True) * 30, normal),
        "silu": lambda: torch.nn.functional.silu(normal * 2),
        "softmax": lambda: (normal * 3).softmax(1),
        "negative": lambda: -normal.abs(),
        "few values": lambda: normal.mul(2).round(),
        "quantized": lambda: normal.mul(20).round() / 20 * 0.7,
        "half zeros": lambda: normal * (uniform < 0.5),
        "constant": lambda: torch.full_like(normal, 0.37),
        "constant but one": lambda: torch.where(torch.arange(n) == 0, -0.2, 0.37).expand(channels, n).clone(),
        "zero": lambda: torch.zeros_like(normal),
        "shifted": lambda: normal * 0.1 + 3,
        "two lumps": lambda: normal * 0.01 + (uniform < 0.1) * 5 - 1,
        "spike at edge": lambda: torch.where(uniform < 0.3, normal.amax(), normal),
    }
    return (kinds[kind]() * spread).contiguous()


KINDS = [
    "normal", "heavy tail", "one outlier", "silu", "softmax", "negative", "few values", "quantized", "half zeros",
    "constant", "constant but one", "zero", "shifted", "two lumps", "spike at edge",
]  # fmt: skip


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    bits=st.integers(2, 8),
    channels=st.sampled_from([1, 2, 5]),
    n=st.sampled_from([1, 2, 9, 64, 576, 1000, 5000]),
    exponent=st.sampled_from([2.4, 2.0, 1.0, 3.0, 0.5]),
    mid=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_search_with_bounds_equals_full_search(kind, bits, channels, n, exponent, mid, seed):
    rows, levels = draw_rows(kind, channels, n, seed), 2**bits
    side = side_of(rows)
    radius, scales, zero_points = candidates(rows, levels, side, mid_zero_point=mid)
    bounds = symmetric_bounds(rows, radius, scales, zero_points, levels, exponent, side)
    expected = full_search(rows, scales, zero_points, levels, exponent)
    assert torch.equal(search(rows, scales, zero_points, levels, exponent, bounds), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_large_tensors_equal_full_search(kind, bits):
    rows, levels = draw_rows(kind, 1, 40_000, seed=bits), 2**bits
    side = side_of(rows)
    radius, scales, zero_points = candidates(rows, levels, side)
    bounds = symmetric_bounds(rows, radius, scales, zero_points, levels, 2.4, side)
    expected = full_search(rows, scales, zero_points, levels, 2.4)
    assert torch.equal(search(rows, scales, zero_points, levels, 2.4, bounds), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("exponent", [1.0, 2.4])
def test_bounds_are_below_the_scores(kind, bits, exponent):
    rows, levels = draw_rows(kind, 3, 3000, seed=7), 2**bits
    side = side_of(rows)
    radius, scales, zero_points = candidates(rows, levels, side)
    bounds = symmetric_bounds(rows, radius, scales, zero_points, levels, exponent, side)
    x, s, z = rows[:, None], scales[:, :, None], zero_points[:, :, None]
    q = (torch.clamp(torch.round(x / s) + z, 0, levels - 1) - z) * s
    scores = (x - q).double().abs().pow(exponent).mean(2)
    assert (bounds * (1 - range_search.SLACK) <= scores + 1e-37).all()


def test_bounds_leave_few_candidates_to_score(monkeypatch):
    scored, original = [], range_search._scores
    monkeypatch.setattr(
        range_search, "_scores", lambda *args, **kw: (scored.append(int(args[5].sum())), original(*args, **kw))
    )
    for kind in ("normal", "silu", "softmax"):
        for bits in (4, 8):
            scored.clear()
            rows = draw_rows(kind, 1, 65536, seed=0)
            side = side_of(rows)
            radius, scales, zero_points = candidates(rows, 2**bits, side)
            bounds = symmetric_bounds(rows, radius, scales, zero_points, 2**bits, 2.4, side)
            search(rows, scales, zero_points, 2**bits, 2.4, bounds)
            assert sum(scored) <= 15, (kind, bits)


def test_first_of_equal_scores_wins():
    rows = torch.zeros(2, 10)
    ones = torch.ones(2, 7)
    assert search(rows, ones, ones, 4, 2.4).tolist() == [0, 0]


def test_chunks_do_not_change_the_choice(monkeypatch):
    weight = draw_rows("normal", 6, 300, seed=3)
    expected = MSE().weight(weight, 4)
    monkeypatch.setattr(range_search, "CPU_CHUNK", 700)
    for ours, theirs in zip(MSE().weight(weight, 4), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.gpu
def test_bounds_leave_the_choice_on_cuda_unchanged():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for kind in KINDS:
        rows, levels = draw_rows(kind, 4, 5000, seed=1), 256
        side = side_of(rows)
        radius, scales, zero_points = (v.cuda() for v in candidates(rows, levels, side))
        bounds = symmetric_bounds(rows.cuda(), radius, scales, zero_points, levels, 2.4, side)
        expected = search(rows.cuda(), scales, zero_points, levels, 2.4)
        assert torch.equal(search(rows.cuda(), scales, zero_points, levels, 2.4, bounds), expected), kind

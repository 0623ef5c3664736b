from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edadm.calibration.allocate import allocate


def shares(*weights: float) -> torch.Tensor:
    return torch.tensor(weights) / sum(weights)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60), st.integers(0, 300))
def test_counts_sum_to_n_and_are_never_negative(weights, n):
    share = shares(*weights) if sum(weights) > 1e-3 else torch.full((len(weights),), 1 / len(weights))
    counts = allocate(share, n)
    assert counts.sum() == n and counts.min() >= 0


def test_rounding_is_half_to_even():
    assert allocate(shares(0.5, 1.5, 2.5, 3.5), 8).tolist() == [0, 2, 2, 4]


def test_missing_rows_go_to_the_largest_counts_not_the_largest_fractions():
    # shares of n: 10.1, 1.45, 1.45; the largest fractions are the small ones
    assert allocate(torch.tensor([10.1, 1.45, 1.45]) / 13, 13).tolist() == [11, 1, 1]


def test_equal_counts_are_ordered_by_the_lower_step():
    assert allocate(shares(1, 1, 1, 1), 6).tolist() == [2, 2, 1, 1]  # 1.5 rounds to 2 each, two too many from the end
    assert allocate(shares(1, 1, 1, 1), 5).tolist() == [2, 1, 1, 1]
    assert allocate(shares(1, 1, 1, 1), 2).tolist() == [1, 1, 0, 0]  # 0.5 rounds to 0


def test_excess_rows_are_taken_from_the_end_and_zeros_are_passed_over():
    assert allocate(torch.tensor([0.15, 0.15, 0.15, 0.15, 0.15, 0.25, 0.0]), 4).tolist() == [1, 1, 1, 1, 0, 0, 0]


def test_passes_repeat_until_the_sum_fits():
    """The official code stops after one pass and then fails its assertion."""
    low = torch.full((4,), 0.1)  # not normalised: 1 each of 40 wanted
    assert allocate(low, 12).tolist() == [3, 3, 3, 3]
    high = torch.full((4,), 1.0)
    assert allocate(high, 3).tolist() == [1, 1, 1, 0]


def test_nonsense_is_an_error():
    with pytest.raises(ValueError, match="-1 rows"):
        allocate(shares(1, 1), -1)
    with pytest.raises(ValueError, match="nan"):
        allocate(torch.tensor([float("nan"), 1.0]), 2)

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
import pytest
import torch

from baselines.ptq4dm import Normal
from edadm.calibration.random import Random
from edadm.calibration.tdac import TDAC
from edadm.diagnostics.inputs import Inputs
from edadm.diagnostics.scores import by_step, correlation, measure, step_shares
from edadm.errors import EdadmError
from edadm.keys import Run
from edadm.progress import Progress

Toy = Callable[..., Run]


def test_shares_of_a_clamped_normal_pile_up_at_the_ends() -> None:
    shares = step_shares(Normal(0.4, 0.4), 20)
    normal = NormalDist(0.4, 0.4)
    assert sum(shares) == pytest.approx(1)
    assert shares[-1] == pytest.approx(normal.cdf(1 / 20), abs=0.015)  # the last call has the least noise
    assert shares[0] == pytest.approx(1 - normal.cdf(19 / 20), abs=0.015)


def test_shares_of_uniform_draws_are_equal_and_those_of_features_unknown() -> None:
    assert step_shares(Random(), 10) == pytest.approx([0.1] * 10, abs=0.015)
    with pytest.raises(EdadmError, match="TDAC"):
        step_shares(TDAC(), 10)


def test_correlation_of_a_line_a_monotone_curve_and_a_constant() -> None:
    curves = {"x": [0.0, 1, 2, 3], "line": [1.0, 3, 5, 7], "down": [0.0, -1, -8, -27], "flat": [2.0] * 4}
    assert correlation(curves, "x", "line")["pearson"] == pytest.approx(1)
    assert correlation(curves, "x", "down")["spearman"] == pytest.approx(-1)
    assert -1 < correlation(curves, "x", "down")["pearson"] < 0
    assert correlation(curves, "x", "flat")["pearson"] is None


def test_a_run_has_its_scores_beside_ndtc_and_its_loss(toy: Toy) -> None:
    inputs = Inputs(toy("method=rtn"), Progress("toy"))
    values = measure(inputs)
    curves = values["curves"]
    assert {len(curve) for curve in curves.values()} == {4}
    errors = inputs.step_errors
    assert curves["loss"] == pytest.approx((errors.error.sum(1) / (errors.error.shape[1] * 3 * 32 * 32)).tolist())
    assert curves["relative_loss"][0] == pytest.approx(10 ** (-errors.values[0] / 10))
    assert max(curves["density"]) <= 3 and min(curves["variety"]) > 0
    assert [found["of"] for found in values["correlations"]][:2] == [["density", "ndtc"], ["variety", "loss"]]


def test_scores_of_a_tdac_run_are_those_that_chose_its_rows(toy: Toy) -> None:
    inputs = Inputs(toy("method=rtn", "calibration=tdac", "calibration.threshold=0.05"), Progress("toy"))
    values = measure(inputs)
    chosen = inputs._calibration.info
    assert values["threshold"] == chosen["threshold"] == 0.05
    assert values["curves"]["density"] == chosen["density"]
    assert values["curves"]["variety"] == pytest.approx(chosen["variety"])


def test_the_calls_of_one_step_are_averaged() -> None:
    energy = np.array([[1.0, 3.0], [5.0, 7.0], [10.0, 10.0]])
    assert by_step(energy, torch.tensor([0, 0, 1])).tolist() == [4.0, 10.0]

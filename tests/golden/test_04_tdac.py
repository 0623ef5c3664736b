"""TDAC scores, counts and selection against the official code (golden README 5)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edadm.calibration.allocate import allocate
from edadm.calibration.tdac import TDAC, density, shares, variety
from edadm.calibration.trajectories import Trajectories, collect
from edadm.sampling.ddim import Sampler
from tests.golden.cases import assert_close_to_max, load

Case = tuple[dict, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def case_and_tensors(golden: Path) -> Case:
    return load(golden / "eda_ddim" / "04_tdac")


def defined(case: dict) -> dict[str, dict]:
    """The cases that the official code can compute; the others divide by zero there."""
    return {name: settings for name, settings in case["cases"].items() if settings["official"] == "ok"}


class StoredPermutation:
    def __init__(self, order: torch.Tensor):
        self.order = order.numpy()

    def permutation(self, n: int) -> np.ndarray:
        assert n == len(self.order)
        return self.order


def test_density_and_variety_equal_official(case_and_tensors):
    case, tensors = case_and_tensors
    for name, settings in case["cases"].items():  # the undefined ones, too: only their scaling fails
        features = tensors[settings["features"]]
        near, r = density(features, settings["r"])
        assert r == settings["r"]
        assert near.tolist() == tensors[f"{name}.density"].tolist(), name
        expected = tensors[f"{name}.variety"].double()
        # near-parallel features: the official 1 - cos is float32 noise of about 1e-7 there, and its scaling undefined
        noise = 0 if settings["official"] == "ok" else 1e-7 * len(features) * features[0].numel() / features.shape[2]
        torch.testing.assert_close(
            variety(features), expected, rtol=case["tolerance"]["variety_rel"], atol=noise, msg=name
        )


def test_shares_equal_official(case_and_tensors):
    case, tensors = case_and_tensors
    for name, settings in defined(case).items():
        share = shares(tensors[f"{name}.density"], variety(tensors[settings["features"]]), settings["lamda"])
        torch.testing.assert_close(share, tensors[f"{name}.prob"], rtol=0, atol=case["tolerance"]["prob_abs"], msg=name)


def test_counts_equal_official(case_and_tensors):
    case, tensors = case_and_tensors
    for name, settings in defined(case).items():
        features = tensors[settings["features"]]
        near, _ = density(features, settings["r"])
        counts = allocate(shares(near, variety(features), settings["lamda"]), settings["N"])
        rounded, official = tensors[f"{name}.counts_rounded"], tensors[f"{name}.counts"]
        assert counts.sum() == settings["N"]
        if settings["remainder"] <= 0:
            assert counts.tolist() == official.tolist(), name
            continue
        # one more each for any set of the largest rounded counts: the official order of equal counts is unstable
        extra = settings["remainder"]
        assert set((counts - rounded).tolist()) == ({0, 1} if extra < len(counts) else {1}), name
        assert sorted(rounded[counts > rounded].tolist()) == sorted(rounded.tolist())[-extra:], name
        assert sorted(counts.tolist()) == sorted(official.tolist()), name


def test_selection_equals_official(case_and_tensors, monkeypatch):
    """From the official counts, whose order among equals is unstable (see above), through the whole of ``select``."""
    case, tensors = case_and_tensors
    for name, settings in defined(case).items():
        features, n = tensors[settings["features"]], settings["N"]
        rows = torch.arange(n) % settings["rows"]  # the official code uses its trajectories again
        xs = tensors[settings["samples"]] if "samples" in settings else torch.rand(len(features), settings["rows"], 1)
        timesteps = torch.tensor(settings["seq_ascending"][::-1])
        trajectories = Trajectories(xs[:, rows], timesteps, features[:, :n])
        part = TDAC(threshold=settings["r"], weight=settings["lamda"])
        monkeypatch.setattr("edadm.calibration.tdac.allocate", lambda *_, name=name: tensors[f"{name}.counts"])
        chosen, _ = part.select(trajectories, n, StoredPermutation(tensors[f"{name}.permutation"]))
        assert torch.equal(rows, tensors[f"{name}.row_index"]), name
        assert torch.equal(chosen.step, tensors[f"{name}.step_index"]), name
        assert torch.equal(chosen.timestep, tensors[f"{name}.t"]), name
        stored = tensors.get(f"{name}.calib_x")
        if stored is not None:
            assert torch.equal(chosen.x[: len(stored)], stored), name


def test_undefined_cases_get_rows_all_the_same(case_and_tensors, caplog):
    case, tensors = case_and_tensors
    for name, settings in case["cases"].items():
        if settings["official"] == "ok":
            continue
        features = tensors[settings["features"]]
        caplog.clear()
        near, _ = density(features, settings["r"])
        counts = allocate(shares(near, variety(features), settings["lamda"]), settings["N"])
        assert counts.sum() == settings["N"] and counts.min() >= 0, name
        assert "density" in caplog.text, name


def sampler_of(ascending: list[int]) -> Sampler:
    n = len(ascending)  # uniform steps that do not divide the schedule give one entry more
    made = (Sampler(spacing, steps) for spacing in ("quad", "uniform") for steps in (n, n - 1))
    return next(sampler for sampler in made if sampler.timesteps == ascending[::-1])


def test_features_and_inputs_of_the_network_equal_official(case_and_tensors, golden, golden_unet, monkeypatch):
    case, tensors = case_and_tensors
    settings = next(s for s in case["cases"].values() if s.get("samples") == "net.xs")
    xs, features = tensors["net.xs"], tensors["net.features"]
    monkeypatch.setattr("edadm.calibration.trajectories.noise", lambda *_: tensors["net.x_init"])
    batch = xs.shape[1]
    ours = collect(
        golden_unet,
        sampler_of(settings["seq_ascending"]),
        batch,
        shape=xs.shape[2:],
        seed=0,
        batch=batch,
        feature_module="mid_block.resnets.0",
    )
    assert ours.timesteps.tolist() == settings["seq_ascending"][::-1]
    tolerance = load(golden / "eda_ddim" / "03_ddim")[0]["tolerance"]["free_running_rel_to_max"]
    assert_close_to_max(ours.x, xs, tolerance)
    assert_close_to_max(ours.features, features, tolerance)

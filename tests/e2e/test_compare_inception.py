"""Runs scored in the features of Inception (random weights) and their differences."""

from __future__ import annotations

from pathlib import Path

import pytest

from edadm import compare, experiment, records
from edadm.comparison import difference, draws_path, read_all_draws
from edadm.metrics.images import write_folder
from edadm.store import Store, file_sha256
from tests.e2e.toy_task import prepare
from tests.metrics.conftest import inception_weights, random_images  # noqa: F401

SMALL = ("profile=reference", "profile.rows=8", "profile.batch=4", "method=rtn", "metrics=inception")


@pytest.mark.slow
def test_distances_in_inceptions_features_have_intervals(
    toy_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    inception_weights: Path,  # noqa: F811
) -> None:
    monkeypatch.setenv("EDADM_CACHE", str(tmp_path / "cache"))
    write_folder(random_images(8, 32), tmp_path / "real")
    given = {"weights": inception_weights, "sha256": file_sha256(inception_weights), "reference": tmp_path / "real"}
    words = [f"metrics.inception.{name}={value}" for name, value in given.items()]
    run = prepare(toy_model, tmp_path / "results", *SMALL, "metrics.names=[fid,is]", "n_images=10", *words)
    record = records.read(path := experiment.execute(run))
    draws = read_all_draws([tmp_path / "results"])
    found = draws[record.hash].metrics
    assert (len(found["fid"].draws), len(found["is"].draws), found["fid"].n) == (50, 200, 10)
    fp = next(made for made in records.read_all([tmp_path / "results"]) if made.is_fp)
    contrast = difference({0: record}, {0: fp}, "fid", draws)
    assert contrast is not None
    assert contrast.value == pytest.approx(record.metrics["fid"]["value"] - fp.metrics["fid"]["value"])
    assert contrast.resamples == 50 and contrast.half_width > 0

    draws_path(path).unlink()
    (tmp_path / "real" / "000000.png").unlink()
    compare._evaluation.cache_clear()
    [line] = compare.complete([record], tmp_path / "results", Store())
    assert "other reference statistics (inception)" in line

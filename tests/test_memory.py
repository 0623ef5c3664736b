from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from edadm import config, estimate, experiment, memory, records, stages, store
from edadm.errors import EdadmError
from edadm.keys import Run
from edadm.quant import io
from edadm.reconstruction.cache import Cache
from tests.e2e.conftest import toy, toy_model

__all__ = ["toy", "toy_model"]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What a run finds free: plenty, unless a test takes it away."""
    found = {"device": math.inf, "host": math.inf, "disk": math.inf}
    monkeypatch.setattr(memory, "free_bytes", lambda run: found)
    return found


def announced(run: Run) -> str:
    return estimate.announcement(run, None)


def just_too_little(run: Run) -> float:
    """Free bytes that hold what is known to be needed with the cache on the device, but not quite the estimate."""
    need = memory.need_of_denoiser(run, run.task.denoiser())
    return need.peaks["device"] - need.present["device"] - 1


def test_the_announcement_names_the_largest_unit_and_the_peak(toy: Callable[..., Run], free: dict[str, float]) -> None:
    text = announced(toy("method=edadm"))
    # 8 rows: twice 16 + 8 channels of 32 x 32 in, 8 out, 8 of conv1 and conv2, 8 of time, 32 of time in
    size = 8 * 4 * (2 * 24 * 1024 + 8 * 1024 + 2 * 8 * 1024 + 8 + 32) / 2**20
    assert f"memory: inputs and targets of up to {size:.3g} MiB a unit (up_blocks.1.resnets.0; all " in text
    assert "kept on the device; peak about" in text and "WARNING" not in text
    assert "memory:" not in announced(toy("method=rtn"))


# 8 trajectories of 4 steps on images of 3 x 32 x 32; the toy's middle has 16 channels of 16 x 16
INPUTS, FEATURES = 4 * 4 * 8 * 3 * 32 * 32, 4 * 4 * 8 * 16 * 16 * 16


def test_trajectories_are_announced_where_they_are_collected(toy: Callable[..., Run], free: dict[str, float]) -> None:
    run = toy("method=edadm")
    assert memory.trajectory_bytes(run, 16 * 16 * 16, 1) == (INPUTS, FEATURES)
    said = f"{INPUTS / 2**20:.3g} MiB of inputs and {FEATURES / 2**20:.3g} MiB of features (mid_block.resnets.0)"
    assert f"trajectories: {said}, in memory and on disk" in announced(run)
    stages.trajectories(run)
    assert "MiB of features" not in announced(toy("method=rtn"))
    assert "MiB of features" not in announced(toy("method=fp"))


@pytest.mark.parametrize(("what", "remedy"), [("host", "a smaller chunk"), ("disk", "a larger disk")])
def test_trajectories_that_cannot_fit_are_an_error(
    what: str, remedy: str, toy: Callable[..., Run], free: dict[str, float]
) -> None:
    free[what] = INPUTS + FEATURES
    announced(toy("method=rtn"))
    free[what] -= 1
    with pytest.raises(EdadmError, match=f"trajectories needs at least .* are free: choose fewer rows .*{remedy}"):
        announced(toy("method=rtn"))


def test_features_of_the_first_batches_only_are_counted(toy: Callable[..., Run]) -> None:
    run = toy("method=edadm", "+recipe.tdac.feature_batches=1")
    assert memory.trajectory_bytes(run, 100, 2) == (INPUTS, 4 * 4 * 2 * 4 * 100)  # a chunk of 4, twice


def test_the_first_place_that_fits_is_taken(toy: Callable[..., Run], free: dict[str, float]) -> None:
    run = toy("method=edadm")
    free["device"] = just_too_little(run)
    assert "kept on the disk" in announced(run)


def test_what_may_not_fit_is_a_warning_with_the_remedy(toy: Callable[..., Run], free: dict[str, float]) -> None:
    run = toy("method=edadm", "reconstruction.cache=device")
    free["device"] = just_too_little(run)
    text = announced(run)
    assert "kept on the device" in text and "WARNING: the reconstruction needs about" in text
    assert "more memory with reconstruction.cache=device" in text
    assert "are free: choose reconstruction.cache=disk, fewer rows (profile.rows)" in text


def test_what_cannot_fit_is_an_error_before_anything_is_computed(
    toy: Callable[..., Run], free: dict[str, float], tmp_path: Path
) -> None:
    free["device"] = free["disk"] = 1000.0
    run = toy("method=edadm")
    with pytest.raises(EdadmError, match=r"needs at least .* more .* fewer rows \(profile\.rows\)"):
        experiment.execute(run)
    assert not list((tmp_path / "cache").glob("*/*"))


def test_what_is_free_is_known_on_linux(toy: Callable[..., Run]) -> None:
    found = memory.free_bytes(toy("method=edadm"))
    assert found["device"] == found["host"] > 0 and 0 < found["disk"] < math.inf


def test_where_the_cache_lies_is_no_part_of_a_run(toy: Callable[..., Run]) -> None:
    plain = toy("method=edadm")
    for place in ("device", "host", "disk"):
        other = toy("method=edadm", f"reconstruction.cache={place}")
        assert other.hash == plain.hash and other.settings.variant == {} | plain.settings.variant
    with pytest.raises(EdadmError, match=r"reconstruction\.cache=tape: choose auto, device, host, disk"):
        toy("method=edadm", "reconstruction.cache=tape")


@pytest.mark.parametrize("name", config.options("reconstruction"))
def test_every_reconstruction_takes_a_place(name: str) -> None:
    words = [f"reconstruction={name}", "reconstruction.cache=disk"]
    assert config.settings(config.compose(words), words)["reconstruction.cache"] == "disk"


def test_the_place_changes_no_artefact_and_no_record(
    toy: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = {}
    for place in ("device", "host", "disk"):
        monkeypatch.setenv("EDADM_CACHE", str(tmp_path / place))
        words = ("method=edadm", f"reconstruction.cache={place}", f"results={tmp_path / place / 'results'}")
        run = toy(*words)
        left = run.store.workspace("quantized", run.key("quantized")) / stages.CACHE / "of a killed run"
        left.parent.mkdir(parents=True)
        left.write_bytes(bytes(10))
        record = records.read(experiment.execute(run))
        folder = run.store.path("quantized", run.key("quantized"))
        assert not (folder / store.SCRATCH).exists()
        made[place] = ((folder / io.WEIGHTS).read_bytes(), record.hash, record.config, record.metrics)
    assert made["device"] == made["host"] == made["disk"]


def test_a_run_uses_the_place_that_was_announced(
    toy: Callable[..., Run], free: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    places = []
    enter = Cache.__enter__
    monkeypatch.setattr(Cache, "__enter__", lambda self: places.append(self.place) or enter(self))
    run = toy("method=edadm")
    free["device"] = just_too_little(run)
    experiment.execute(run)
    assert places == ["disk"]

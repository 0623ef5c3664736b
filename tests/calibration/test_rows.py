from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from baselines.ptq4dm import Normal
from edadm.calibration.random import Random
from edadm.calibration.rows import CalibrationSet, RowSampler, step_counts, take
from edadm.calibration.tdac import TDAC
from edadm.calibration.uniform import Uniform
from edadm.errors import EdadmError
from edadm.sampling.noise import SELECTION, numpy_rng

METADATA = {"task": "toy", "sampler": "quad 20", "seed": 3, "method": "edadm"}
PARTS: list[RowSampler] = [Random(), Uniform(), Uniform(steps=3), TDAC(), Normal()]

PINNED_STEPS = {
    "Random(version=1)": "924137785833566765892923",
    "Uniform(steps=20, version=1)": "650835692803021147231947",
    "Uniform(steps=3, version=1)": "690093096669003309639363",
    "TDAC(threshold=None, weight=1.2, version=1)": "156281560630030712843245",
    "Normal(mean=0.4, std=0.4, version=1)": "985257794997757796541292",
}


@pytest.fixture
def rows() -> CalibrationSet:
    return CalibrationSet(torch.rand(4, 3, 2, 2), torch.tensor([9, 9, 5, 0]), torch.tensor([0, 0, 1, 2]))


def tensors_of(rows: CalibrationSet) -> dict[str, torch.Tensor]:
    return {"x": rows.x, "timestep": rows.timestep, "step": rows.step}


@pytest.mark.parametrize("part", PARTS, ids=repr)
@pytest.mark.parametrize("n", [1, 7, 24])
def test_every_part_selects_n_rows_that_belong_together(part, n, trajectories):
    chosen, diagnostics = part.select(trajectories, n, numpy_rng(SELECTION, 0))
    assert len(chosen) == n == sum(diagnostics["counts"])
    assert torch.equal(chosen.timestep, trajectories.timesteps[chosen.step])
    assert torch.equal(chosen.x[:, 0].flatten().long(), chosen.step)
    assert diagnostics["counts"] == step_counts(chosen.step.numpy(), trajectories.steps)


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_every_part_is_a_function_of_its_generator(part, trajectories):
    def steps(seed):
        return part.select(trajectories, 24, numpy_rng(SELECTION, seed))[0].step.tolist()

    assert steps(0) == steps(0) != steps(1)


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_every_part_uses_the_trajectories_it_says_and_no_fewer(part, trajectories):
    needed = part.trajectories_needed(24, trajectories.steps)
    chosen, _ = part.select(trajectories, 24, numpy_rng(SELECTION, 0))
    assert chosen.x[:, 1].unique().tolist() == list(range(needed))
    too_few = type(trajectories)(
        trajectories.x[:, : needed - 1], trajectories.timesteps, trajectories.features[:, : needed - 1]
    )
    with pytest.raises(EdadmError, match=f"{needed - 1} stored trajectories are too few.*need {needed}"):
        part.select(too_few, 24, numpy_rng(SELECTION, 0))


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_no_part_makes_an_empty_set(part, trajectories):
    with pytest.raises(EdadmError, match="0 rows"):
        part.select(trajectories, 0, numpy_rng(SELECTION, 0))


@pytest.mark.parametrize("part", PARTS, ids=repr)
def test_selection_is_pinned(part, trajectories):
    """Other rows mean other results for every record: raise the part's version with the pin."""
    chosen, _ = part.select(trajectories, 24, numpy_rng(SELECTION, 0))
    assert (part.version, "".join(map(str, chosen.step.tolist()))) == (1, PINNED_STEPS[repr(part)])


def test_take_pairs_steps_and_trajectories(trajectories):
    chosen = take(trajectories, np.array([3, 3, 0]), np.array([5, 6, 5]))
    assert chosen.x[:, :, 0, 0].tolist() == [[3, 5], [3, 6], [0, 5]]
    assert chosen.timestep.tolist() == [600, 600, 900] and chosen.step.tolist() == [3, 3, 0]


@pytest.fixture
def guided(rows) -> CalibrationSet:
    """Rows of labels 0 to 3 with their token, and null label 9."""
    condition = {"class_labels": torch.arange(4), "encoder_hidden_states": torch.arange(8.0).view(4, 1, 2)}
    null = {"class_labels": torch.tensor([9]), "encoder_hidden_states": torch.full((1, 1, 2), -1.0)}
    return CalibrationSet(rows.x, rows.timestep, rows.step, condition, null)


def test_inputs_without_a_condition_are_the_rows(rows):
    x, timestep, condition = rows.inputs()
    assert x is rows.x and timestep is rows.timestep and condition == {}


def test_guidance_gives_every_row_twice_in_a_row_with_the_null_condition_first(guided):
    x, timestep, condition = guided.inputs()
    assert len(guided) == 4 and len(x) == 8
    assert torch.equal(x[::2], guided.x) and torch.equal(x[1::2], guided.x)
    assert timestep.tolist() == [9, 9, 9, 9, 5, 5, 0, 0]
    assert condition["class_labels"].tolist() == [9, 0, 9, 1, 9, 2, 9, 3]
    assert condition["encoder_hidden_states"][:, 0, 1].tolist() == [-1, 1, -1, 3, -1, 5, -1, 7]


def test_a_condition_without_guidance_is_not_doubled(guided):
    rows = CalibrationSet(guided.x, guided.timestep, guided.step, guided.condition)
    x, _, condition = rows.inputs()
    assert x is guided.x and condition["class_labels"].tolist() == [0, 1, 2, 3]


def test_take_gives_every_row_the_condition_of_its_trajectory(trajectories):
    condition, null = {"class_labels": torch.arange(24) + 100}, {"class_labels": torch.tensor([9])}
    labelled = dataclasses.replace(trajectories, condition=condition, null=null)
    chosen = take(labelled, np.array([3, 3, 0]), np.array([5, 6, 5]))
    assert chosen.condition["class_labels"].tolist() == [105, 106, 105] and chosen.null == null
    for part in PARTS:
        chosen, _ = part.select(labelled, 24, numpy_rng(SELECTION, 0))
        assert torch.equal(chosen.condition["class_labels"], chosen.x[:, 1].flatten().long() + 100)


def test_fractional_times_are_kept(rows, tmp_path):
    times = torch.tensor([949.05, 899.1, 0.5, 0.0], dtype=torch.float64)
    rows = CalibrationSet(rows.x, times, rows.step)
    loaded, _ = CalibrationSet.load(rows.save(tmp_path / "rows.safetensors", {}))
    assert loaded.timestep.dtype == torch.float64 and torch.equal(loaded.timestep, times)


def test_a_saved_guided_set_comes_back(guided, tmp_path):
    loaded, _ = CalibrationSet.load(guided.save(tmp_path / "rows.safetensors", {}))
    for ours, theirs in ((loaded.condition, guided.condition), (loaded.null, guided.null)):
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_null_condition_of_another_form_is_an_error(guided):
    with pytest.raises(EdadmError, match="they must agree"):
        CalibrationSet(guided.x, guided.timestep, guided.step, None, guided.null)


def test_a_saved_set_comes_back_with_its_metadata(rows, tmp_path):
    path = rows.save(tmp_path / "new" / "rows.safetensors", METADATA)
    loaded, metadata = CalibrationSet.load(path, min_rows=4, shape=(3, 2, 2))
    assert metadata == {name: str(value) for name, value in METADATA.items()}
    assert all(torch.equal(tensor, tensors_of(rows)[name]) for name, tensor in tensors_of(loaded).items())
    assert loaded.condition is None and loaded.null is None
    with safe_open(path, "pt") as file:
        assert sorted(file.keys()) == ["step", "timestep", "x"]


def test_a_small_stored_set_is_an_error(rows, tmp_path):
    path = rows.save(tmp_path / "rows.safetensors", {})
    with pytest.raises(EdadmError, match="holds 4 rows, 5 are needed"):
        CalibrationSet.load(path, min_rows=5)


def test_a_set_of_another_task_is_an_error(rows, tmp_path):
    path = rows.save(tmp_path / "rows.safetensors", {})
    with pytest.raises(EdadmError, match=r"shape \(3, 2, 2\), the network expects \(3, 32, 32\)"):
        CalibrationSet.load(path, shape=(3, 32, 32))


def test_missing_and_unknown_tensors_are_named(rows, tmp_path):
    path = tmp_path / "rows.safetensors"
    save_file({"x": rows.x, "labels": rows.step}, path)
    with pytest.raises(EdadmError, match=r"lacks timestep, step and has unknown labels; expected x, timestep, step"):
        CalibrationSet.load(path)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("x", torch.zeros(4), r"x is float32 \(4,\)"),
        ("x", torch.zeros(0, 3, 2, 2), "x is float32"),
        ("x", torch.zeros(4, 3, 2, 2, dtype=torch.float64) / 0, "NaN or Inf"),
        ("timestep", torch.zeros(3, dtype=torch.int64), r"timestep is int64 \(3,\), expected 4 numbers"),
        ("timestep", torch.tensor([0, 1, 2, -1]), "timestep is int64"),
        ("timestep", torch.tensor([0, 1, 2, float("nan")]), "timestep is float32"),
        ("step", torch.zeros(4), r"step is float32 \(4,\), expected 4 integers"),
        ("step", torch.tensor([0, 1, 2, -1]), "step is int64"),
        ("condition.text", torch.zeros(3, 2), r"condition text is float32 \(3, 2\), expected 4 rows"),
    ],
)
def test_misshaped_tensors_are_named_with_the_file(rows, tmp_path, name, wrong, message):
    path = tmp_path / "rows.safetensors"
    save_file(tensors_of(rows) | {name: wrong}, path)
    with pytest.raises(EdadmError, match=rf"rows\.safetensors: .*{message}"):
        CalibrationSet.load(path)


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", None], ids=["empty", "other", "cut"])
def test_a_broken_file_is_an_error(rows, tmp_path, content):
    path = rows.save(tmp_path / "rows.safetensors", {})
    path.write_bytes(path.read_bytes()[:-8] if content is None else content)
    with pytest.raises(EdadmError, match=r"rows\.safetensors is broken"):
        CalibrationSet.load(path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(EdadmError, match=r"no calibration set at .*none\.safetensors"):
        CalibrationSet.load(tmp_path / "none.safetensors")


def test_a_failed_save_keeps_the_old_file(rows, tmp_path, monkeypatch):
    path = rows.save(tmp_path / "rows.safetensors", METADATA)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(EdadmError, match="disk is full"):
        rows.save(path, {})
    assert CalibrationSet.load(path)[1]["task"] == "toy" and len(list(tmp_path.iterdir())) == 1

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from edadm.errors import EdadmError
from edadm.prompts import Prompted
from edadm.sampling.guidance import ClassConditions
from edadm.sampling.noise import CALIBRATION, EVALUATION
from edadm.tasks import text
from edadm.tasks.released import as_released


def lengths(prompts):
    """An encoder whose states are the lengths of the prompts."""
    return torch.tensor([[[float(len(prompt))]] for prompt in prompts])


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join("x" * (i + 1) for i in range(20)))
    return path


def conditions(path: Path, more: str | None = None) -> text.TextConditions:
    return text.TextConditions(*text.split_prompts(str(path), more), lambda: lengths)


def test_calibration_prompts_are_never_evaluated(lines: Path) -> None:
    made = conditions(lines)
    evaluated = made.prompts(EVALUATION, 1234, range(100))
    calibrated = [prompt for seed in range(3) for prompt in made.prompts(CALIBRATION, seed, range(50))]
    assert evaluated[:3] == ["x", "xx", "xxx"] and evaluated[18] == "x"  # 18 prompts, then from the start
    assert {len(prompt) for prompt in calibrated} == {19, 20} and not set(evaluated) & set(calibrated)


def test_a_file_of_calibration_prompts_gives_up_those_that_are_evaluated(lines: Path, tmp_path: Path) -> None:
    other = tmp_path / "captions.json"
    captions = ["xxx", "a cat", "a cat", "a dog"]
    other.write_text(json.dumps({"annotations": [{"caption": caption} for caption in captions]}))
    made = conditions(lines, str(other))
    assert len(made.evaluated) == 20 and sorted(made.calibration) == ["a cat", "a dog"]
    lines.write_text("a cat\na dog\nxxx")
    with pytest.raises(EdadmError, match=r"every prompt of dataset\.calibration_prompts"):
        conditions(lines, str(other))


def test_lines_that_are_there_twice_keep_their_places(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(["a cat", "a dog", "a cat", *"abcdefgh", "a cat", *"ijklmnop"]))
    evaluated, calibration = text.split_prompts(str(path), None)
    assert evaluated == ["a cat", "a dog", "a cat", *"abcdefgh", "a cat", *"ijklmn"] and calibration == ["o", "p"]
    path.write_text("\n".join([*"abcdefghi", "a"]))
    with pytest.raises(EdadmError, match=r"last tenth of .* is there before.*dataset\.calibration_prompts"):
        text.split_prompts(str(path), None)


def test_captions_are_shuffled_the_same_way_every_time(tmp_path: Path) -> None:
    path = tmp_path / "captions_val2014.json"
    captions = [f"caption {i}" for i in range(50)]
    path.write_text(json.dumps({"annotations": [{"caption": f" {caption}\n"} for caption in captions]}))
    evaluated, calibration = text.split_prompts(str(path), None)
    assert (evaluated, calibration) == text.split_prompts(str(path), None)
    assert sorted(evaluated + calibration) == sorted(captions) and evaluated != captions[:45]


def test_rows_are_of_their_prompts_and_the_null_condition_of_the_empty_one(lines: Path) -> None:
    made = conditions(lines)
    rows = made.rows(EVALUATION, 1234, [4, 0, 40])["encoder_hidden_states"]
    assert rows.flatten().tolist() == [5.0, 1.0, 5.0] and isinstance(made, Prompted)
    assert made.null["encoder_hidden_states"].flatten().tolist() == [0.0]


def test_the_released_choice_calibrates_with_the_first_that_are_evaluated(lines: Path) -> None:
    made = as_released(conditions(lines), "released", 1234)
    assert made.prompts(CALIBRATION, 7, range(3)) == ["x", "xx", "xxx"] and isinstance(made, Prompted)
    labels = as_released(ClassConditions(10, 10), "released", 1234)
    own = ClassConditions(10, 10)
    first = own.rows(EVALUATION, 1234, range(6))["class_labels"]
    assert torch.equal(labels.rows(CALIBRATION, 7, range(6))["class_labels"], first)
    assert not torch.equal(own.rows(CALIBRATION, 7, range(6))["class_labels"], first)
    assert labels.identity(CALIBRATION) != own.identity(CALIBRATION)
    assert labels.identity(EVALUATION) == own.identity(EVALUATION)
    with pytest.raises(EdadmError, match="disjoint or released"):
        as_released(own, "both", 1234)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"\n", "holds no prompts"), ("latin.txt", "é".encode("latin-1"), "not UTF-8"),
        ("one.txt", b"a cat", "one prompt"), ("other.json", b'{"images": []}', "no caption file of MS-COCO"),
        ("broken.json", b'{"annotations": [', "no caption file of MS-COCO"),
        ("empty.json", b'{"annotations": []}', "holds no captions"),
    ],
)  # fmt: skip
def test_a_file_that_holds_no_prompts_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EdadmError, match=message):
        text.split_prompts(str(tmp_path / name), None)

"""The cards of the embedded assets say what a record of these very files says."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from edadm.errors import EdadmError
from edadm.metrics import tiny
from edadm.report.page import with_block
from edadm.sampling.ddim import Sampler
from edadm.tasks.cifar10 import CLASSES
from experiments import card_tiny
from experiments.card_tiny import BLOCK, DENOISER, RECORD, blocks, identity, read
from tests.toys import tiny_unet


def scores(**changes) -> dict:
    classes = dict.fromkeys(CLASSES, 0.1) | {"cat": 0.19, "ship": 0.01}
    ladder = dict(zip(card_tiny.RUNGS, (0.01, 0.1, 0.2, 0.8, 5.0, 6.0), strict=True))
    found = {
        "schema": 1, "assets": identity(), "n": 2000, "steps": 20, "fd_tiny": 0.8284, "sfd_tiny": 0.12, "is_tiny": 2.29,
        "class_shares": classes, "ladder_fd_tiny": ladder, "fp_over_gaussian": 0.16,
        "classifier_test_accuracy": 0.846, "test_images": 10_000,
    }  # fmt: skip
    return found | changes


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two test images a class, and a small denoiser; the reference statistics are those of noise."""
    rng = np.random.default_rng(0)
    for name, number in itertools.product(CLASSES, range(2)):
        (tmp_path / "test" / name).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "test" / name / f"{number}.png")
    noise = torch.from_numpy(rng.integers(0, 256, (20, 3, 32, 32), dtype=np.uint8))
    reference = tiny.build_reference(noise, tiny.load_network(), "noise")
    monkeypatch.setattr(tiny, "load_reference", lambda: reference)
    monkeypatch.setattr(card_tiny, "SAMPLER", Sampler("quad", 2))
    monkeypatch.setenv("EDADM_CIFAR10", str(tmp_path))
    tiny_unet().save_pretrained(tmp_path / "denoiser")
    return tmp_path


def test_measuring_writes_what_the_cards_are_made_of(data: Path, monkeypatch: pytest.MonkeyPatch):
    record = data / "cards" / "record.json"
    words = ["measure", "--model", data / "denoiser", "--images", 4, "--grid", data / "grid.png", "--record", record]
    monkeypatch.setattr(sys, "argv", ["card_tiny", *map(str, words)])
    card_tiny.main()
    found = read(record)
    assert scores().keys() | {"seed", "sampling_seconds", "provenance"} == found.keys()
    assert found["assets"] == identity(data / "denoiser") and found["assets"] != identity()
    assert found["n"] == 4 and sum(found["class_shares"].values()) == pytest.approx(1)
    assert list(found["ladder_fd_tiny"]) == list(card_tiny.RUNGS) and found["test_images"] == 20
    assert found["ladder_fd_tiny"]["fp_samples"] == found["fd_tiny"]
    assert "| fd_tiny |" in blocks(found | {"assets": identity()})[DENOISER]
    assert (data / "grid.png").is_file()


def test_every_card_shows_the_scores_of_the_committed_record():
    """Else `python -m experiments.card_tiny cards` writes them, after `measure` where the assets are new."""
    found = read() if RECORD.is_file() else None
    for folder, text in blocks(found).items():
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert with_block(card, BLOCK, text) == card, folder.name


def test_the_numbers_of_a_card_are_those_of_the_record():
    texts = blocks(scores())
    assert "| fd_tiny | 0.828 |" in texts[DENOISER] and "2,000 samples, 20 steps" in texts[DENOISER]
    assert "0.160 (accepted below 0.2)" in texts[DENOISER]
    assert "ship 1.0 %" in texts[DENOISER] and "(accepted from 2 % each: **not reached**)" in texts[DENOISER]
    assert "84.6 % (accepted from 88 %: **not reached**)" in texts[tiny.ASSETS]
    assert "| per-pixel Gaussian of the training set | 5.000 |" in texts[tiny.ASSETS]
    assert "does not grow" not in texts[tiny.ASSETS]


def test_a_ladder_out_of_order_is_said_to_be():
    ladder = scores()["ladder_fd_tiny"] | {"uniform_noise": 4.0}
    assert "**does not grow**" in blocks(scores(ladder_fd_tiny=ladder))[tiny.ASSETS]


@pytest.mark.parametrize("which", ["denoiser", "features", "reference"])
def test_a_record_of_other_files_gives_a_card_no_score(which):
    assets = identity() | {which: "0" * 64}
    for text in blocks(scores(assets=assets)).values():
        assert "no record yet" in text and "0.8" not in text


def test_a_broken_record_is_named(tmp_path: Path):
    path = tmp_path / "cifar10_tiny.json"
    for text in ("nonsense", "{}", json.dumps(scores(schema=99))):
        path.write_text(text)
        with pytest.raises(EdadmError, match="holds no record of the embedded assets"):
            read(path)


def test_the_measured_ladder_is_in_order():
    """Held-out images, JPEG, blur, samples, a per-pixel Gaussian and noise are ever further from the training set."""
    ladder = list(json.loads(RECORD.read_text(encoding="utf-8"))["ladder_fd_tiny"].values())
    assert len(ladder) == 6 and ladder == sorted(ladder)

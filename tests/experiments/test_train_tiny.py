"""The training command: a few steps on made-up images, interrupted and continued."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edadm.metrics.tiny_network import TinyResNet
from edadm.tasks.base import load_unet2d
from experiments import train_tiny
from experiments.training import loop
from experiments.training.data import Order, Shuffled
from tests.conftest import ROOT

SMALL = ("--precision", "fp32", "--batch", 5)


class Killed(BaseException):
    """What a kill looks like from inside."""


def train(*words) -> None:
    train_tiny.main([*map(str, words), *map(str, SMALL)])


def killed(monkeypatch: pytest.MonkeyPatch, at: int, run: Callable[[], None]) -> None:
    """Run a training that is killed in one of its steps, with a checkpoint after every second one."""
    take = loop._take

    def until(training, options, loss_of, step):
        if step == at:
            raise Killed
        return take(training, options, loss_of, step)

    monkeypatch.setattr(loop, "SAVE_EVERY", 2)
    monkeypatch.setattr(loop, "_take", until)
    with pytest.raises(Killed):
        run()
    monkeypatch.setattr(loop, "_take", take)


def test_interrupted_training_ends_with_the_same_weights(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("features", "--epochs", 1)
    train(*words, "--name", "whole", "--export", data / "whole")
    killed(monkeypatch, 3, lambda: train(*words, "--name", "parts"))
    kept = torch.load(data / "cache" / "training" / "parts.pt", weights_only=True)
    assert kept.keys() == {"step", "curve", "model", "average", "optimizer", "schedule"} and kept["step"] == 2
    train(*words, "--name", "parts", "--export", data / "parts")
    whole, parts = (load_file(data / name / "features.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    TinyResNet().load_state_dict(whole)


def test_ctrl_c_exports_what_there_is(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = loop._take

    def interrupted(training, options, loss_of, step):
        if step == 1:
            raise KeyboardInterrupt
        return take(training, options, loss_of, step)

    monkeypatch.setattr(loop, "_take", interrupted)
    train("features", "--epochs", 1, "--export", data / "model")
    assert (data / "model" / "features.safetensors").is_file()


def test_a_training_that_diverges_ends(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="diverged at step"):
        train("features", "--epochs", 1, "--lr", 1e30)


@pytest.mark.slow
def test_denoiser_continues_from_a_folder_and_exports_fp16_exact_weights(data: Path) -> None:
    train("denoiser", "--init", ROOT / "edadm" / "assets" / "cifar10_tiny", "--epochs", 0.3, "--export", data / "model")
    model = load_unet2d(data / "model")
    assert all(torch.equal(p, p.half().float()) for p in model.parameters())


def test_every_training_has_its_numbers_and_stands_in_the_help() -> None:
    assert train_tiny.TRAININGS.keys() == train_tiny.NUMBERS.keys()
    text = train_tiny.parser().format_help()
    assert all(name in text for name in train_tiny.TRAININGS)


def test_an_epoch_has_every_image_once_and_mirrors_about_half() -> None:
    order = Order(40, 8, seed=3)
    steps = [order(step) for step in range(2 * order.steps_per_epoch)]
    for epoch in (steps[:5], steps[5:]):
        assert sorted(np.concatenate([rows for rows, _ in epoch]).tolist()) == list(range(40))
    assert 20 < sum(int(flip.sum()) for _, flip in steps) < 60
    assert all(np.array_equal(a, b) for a, b in zip(Order(40, 8, seed=3)(7), steps[7]))


def test_minibatches_are_those_of_their_rows() -> None:
    images = np.arange(40 * 3 * 2 * 2, dtype=np.uint8).reshape(40, 3, 2, 2)
    labels = np.arange(40)
    made, chosen = Shuffled(images, labels, 8, seed=3)(7)
    rows, flip = Order(40, 8, seed=3)(7)
    assert np.array_equal(chosen, rows)
    for row, mirrored, image in zip(rows, flip, made):
        assert np.array_equal(image, images[row][:, :, ::-1] if mirrored else images[row])


def test_the_average_forgets_the_first_weights() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    average = loop.running_average(model, decay=0.5)
    seen = []
    for value in (100.0, *[1.0] * 8, 3.0):
        torch.nn.init.constant_(model.weight, value)
        average.update_parameters(model)
        seen.append(average.module.weight.item())
    assert seen[:2] == pytest.approx([100.0, 1 + 99 * 2 / 11])
    assert seen[9] == pytest.approx((seen[8] + 3) / 2)  # the decay is 0.5 from the ninth step on
    assert seen[8] == pytest.approx(1, abs=0.03)

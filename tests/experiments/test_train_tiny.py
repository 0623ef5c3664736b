"""The training script: a few steps on made-up images, interrupted and continued."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from edadm.metrics.tiny_network import TinyResNet
from edadm.tasks.base import load_unet2d
from edadm.tasks.cifar10 import CLASSES
from experiments import train_tiny
from tests.conftest import ROOT


@pytest.fixture
def data(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(2):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{number}.png")
    monkeypatch.setenv("EDADM_CIFAR10", str(tmp_path))
    monkeypatch.setenv("EDADM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def train(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", *map(str, words), "--precision", "fp32", "--batch", "5"])
    train_tiny.main()


def test_interrupted_training_ends_with_the_same_weights(data, monkeypatch):
    train(monkeypatch, "features", "--epochs", 1, "--name", "whole", "--export", data / "whole")
    optimise = train_tiny.run
    monkeypatch.setattr(
        train_tiny, "run", lambda args, device, path, steps, *rest: optimise(args, device, path, 2, *rest)
    )
    train(monkeypatch, "features", "--epochs", 1, "--name", "parts")
    monkeypatch.setattr(train_tiny, "run", optimise)
    train(monkeypatch, "features", "--epochs", 1, "--name", "parts", "--export", data / "parts")
    whole, parts = (load_file(data / name / "features.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    TinyResNet().load_state_dict(whole)


@pytest.mark.slow
def test_denoiser_continues_from_a_folder_and_exports_fp16_exact_weights(data, monkeypatch):
    train(
        monkeypatch, "denoiser", "--init", ROOT / "edadm" / "assets" / "cifar10_tiny", "--epochs", 0.3,
        "--export", data / "model",
    )  # fmt: skip
    model = load_unet2d(data / "model")
    assert all(torch.equal(p, p.half().float()) for p in model.parameters())

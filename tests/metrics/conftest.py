from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from edadm.metrics import tiny
from edadm.metrics.inception_network import InceptionNetwork, load_network
from edadm.metrics.tiny_network import TinyResNet


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EDADM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def random_images(n: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Smooth coloured patterns: uint8 (n, 3, size, size), different enough for a random network to tell apart."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)
    return (smooth * 255).round().to(torch.uint8)


@pytest.fixture(scope="session")
def tiny_network() -> tiny.TinyNetwork:
    """The network with random weights, so that tests do not depend on the embedded asset."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyResNet()
    return tiny.TinyNetwork(model.eval().requires_grad_(False), "0" * 64)


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory) -> Path:
    """A file of random Inception weights in the layout of torch-fidelity's release."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict, *args, **kwargs):
            return None

    path = tmp_path_factory.mktemp("inception") / "random.pth"
    empty = tmp_path_factory.mktemp("empty") / "empty.pth"
    torch.save({}, empty)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Blank("blank", ["2048"], str(empty))
    state = {}
    for key, value in network.state_dict().items():
        state[key] = value * 1.7 if key.endswith("conv.weight") else value  # keeps the signal from dying out with depth
    torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def inception_network(inception_weights) -> InceptionNetwork:
    return load_network(inception_weights, sha256=None)


@pytest.fixture(scope="session")
def cifar10_test() -> torch.Tensor:
    """Every tenth image of CIFAR-10's test set, from EDADM_CIFAR10 (skips without it)."""
    if not os.environ.get("EDADM_CIFAR10"):
        pytest.skip("set EDADM_CIFAR10 to a CIFAR-10 folder to run this test")
    from edadm.tasks.cifar10 import load_cifar10

    images, _ = load_cifar10("test")
    return torch.from_numpy(images[::10].copy())

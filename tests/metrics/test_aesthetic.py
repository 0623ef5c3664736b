from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edadm.errors import EdadmError
from edadm.metrics import aesthetic, clip

from .conftest import random_images
from .small_clip import EMBED, IMAGE_SIZE, write_clip


def layers(dimensions: int, seed: int = 0) -> nn.Sequential:
    """The second predictor's layers in evaluation mode, on embeddings of any size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(dimensions, 64), nn.Dropout(0.2), nn.Linear(64, 32), nn.Dropout(0.2), nn.Linear(32, 16),
            nn.Dropout(0.1), nn.Linear(16, 8), nn.Linear(8, 1),
        ).double().eval()  # fmt: skip


@pytest.fixture
def head_file(tmp_path):
    path = tmp_path / "head.safetensors"
    save_file({f"layers.{key}": value for key, value in layers(EMBED).state_dict().items()}, path)
    return path


def test_scores_equal_the_layers_on_the_embeddings_of_the_images(tmp_path, head_file):
    network = aesthetic.AestheticNetwork(
        clip.load_network(f"local-dir:{write_clip(tmp_path / 'small')}", None), aesthetic.load_head(head_file)
    )
    images = random_images(5, IMAGE_SIZE)
    pictures = torch.stack([network.clip.preprocess(_pil(image)) for image in images])
    with torch.no_grad():
        raw = network.clip.model.encode_image(pictures).double()
        expected = layers(EMBED)(raw / raw.norm(dim=1, keepdim=True))[:, 0]
    found = aesthetic.scores(clip.image_embeddings(images, network.clip), network.head)
    np.testing.assert_allclose(found, expected, atol=1e-6)  # embeddings are float32
    assert np.ptp(found) > 1e-4 and network.head.name == "head"


def _pil(image):
    from PIL import Image

    return Image.fromarray(image.permute(1, 2, 0).numpy())


def test_a_folded_head_equals_its_layers():
    model = layers(20)
    weight, bias = aesthetic.fold({f"layers.{key}": value for key, value in model.state_dict().items()})
    x = torch.randn(7, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(x @ weight + bias, model(x)[:, 0], rtol=1e-12, atol=1e-12)


def test_layers_follow_each_other_by_number():
    state = {"layers.10.weight": torch.tensor([[5.0]]), "layers.10.bias": torch.tensor([1.0])}
    state |= {"layers.9.weight": torch.tensor([[1.0, 2.0]]), "layers.9.bias": torch.tensor([3.0])}
    weight, bias = aesthetic.fold(state)
    assert weight.tolist() == [5, 10] and bias == 16


@pytest.mark.parametrize(("name", "bias", "norm"), [("v1", 3.5294, 28.4444), ("v2", 5.2366, 17.9956)])
def test_embedded_heads_are_those_of_the_published_files(name, bias, norm):
    head = aesthetic.load_head(name)
    assert head.weight.shape == (768,) and head.name == name and len(head.sha256) == 64
    assert head.bias == pytest.approx(bias, abs=1e-4) and float(head.weight.norm()) == pytest.approx(norm, abs=1e-4)


def test_the_first_head_is_the_published_one():
    state = load_file(aesthetic.HEADS["v1"])
    assert {key: tuple(value.shape) for key, value in state.items()} == {"weight": (1, 768), "bias": (1,)}
    sha256 = "fb247dd28e4f3731e62baeb049dc8ed587dd2f98f5b7f85f0db4ef611ff5ec34"
    assert aesthetic.load_head("v1").sha256 == sha256


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"weight": torch.zeros(1, 3)}, "other tensors"),
        ({"weight": torch.zeros(1, 3), "bias": torch.zeros(1), "scale": torch.zeros(1)}, "other tensors"),
        ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, "one output"),
        ({"weight": torch.full((1, 3), torch.inf), "bias": torch.zeros(1)}, "finite"),
        (
            {
                f"l.{i}.{kind}": torch.zeros(*(1, 3)[: 2 - (kind == "bias")])
                for i in (0, 1)
                for kind in ("weight", "bias")
            },
            "do not follow",
        ),
    ],
)
def test_files_that_are_no_head_are_named(tmp_path, state, reason):
    save_file(state, tmp_path / "head.safetensors")
    with pytest.raises(EdadmError, match=rf"head\.safetensors holds no aesthetic head .*{reason}.*choose v1, v2"):
        aesthetic.load_head(tmp_path / "head.safetensors")


def test_a_missing_head_names_the_choices(tmp_path):
    with pytest.raises(EdadmError, match="no aesthetic head weights at v3: choose v1, v2"):
        aesthetic.load_head("v3")


def test_a_head_needs_embeddings_of_its_size():
    with pytest.raises(EdadmError, match="head v1 takes embeddings of 768 numbers, the CLIP model gives 12"):
        aesthetic.scores(torch.zeros(2, 12), aesthetic.load_head("v1"))

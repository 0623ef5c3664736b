from __future__ import annotations

import functools
import hashlib
import math
import urllib.error

import numpy as np
import pytest
import scipy.linalg
import torch

from edadm.errors import EdadmError
from edadm.metrics import dinov2
from edadm.metrics.frechet import NotAvailable
from edadm.metrics.images import write_folder

from .conftest import random_images

MODEL, WIDTH, DEPTH, HEADS = "dinov2-vit-s-14", 384, 12, 6


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Random weights of ViT-S/14 under the names of Meta's file, 37 x 37 positions included."""
    shapes = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, 1 + 37 * 37, WIDTH), "mask_token": (1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, 14, 14), "patch_embed.proj.bias": (WIDTH,),
        "norm.weight": (WIDTH,), "norm.bias": (WIDTH,),
    }  # fmt: skip
    for i in range(DEPTH):
        layers = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        layers |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
        for name, shape in layers.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{i}.{name}"] = (WIDTH,)
    generator = torch.Generator().manual_seed(0)
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    scale = {
        name: 1 / math.sqrt(math.prod(shape[1:])) if len(shape) in (2, 4) else 0.3 for name, shape in shapes.items()
    }
    gains = {name for name in shapes if "norm" in name and name.endswith("weight")}
    return {name: value * scale[name] + (name in gains) for name, value in values.items()}


@pytest.fixture(scope="module")
def weights(state, tmp_path_factory):
    path = tmp_path_factory.mktemp("dinov2") / "dinov2_vits14_pretrain.pth"
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def network(weights) -> dinov2.Dinov2Network:
    return dinov2.load_network(MODEL, weights, hashlib.sha256(weights.read_bytes()).hexdigest())


def cubic(distance: np.ndarray) -> np.ndarray:
    """The convolution kernel of bicubic interpolation with a = -0.75."""
    d, a = np.abs(distance), -0.75
    near = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * (d**3 - 5 * d**2 + 8 * d - 4)
    return np.where(d <= 1, near, np.where(d < 2, far, 0))


def resampling(n: int, scale: float) -> np.ndarray:
    """Rows of weights that turn n samples into floor(n scale), half-pixel centres, edges repeated, no antialias."""
    matrix = np.zeros((int(n * scale), n))
    for row in range(len(matrix)):
        centre = (row + 0.5) / scale - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[row, min(max(tap, 0), n - 1)] += cubic(np.array(centre - tap))
    return matrix


def tf1_resize(image: np.ndarray, size: int) -> np.ndarray:
    """Bilinear resize of (3, H, W) in TensorFlow 1's convention: pixel i is sampled at i * H / size."""
    for axis in (1, 2):
        n = image.shape[axis]
        at = np.arange(size) * n / size
        low = np.floor(at).astype(int)
        high = np.minimum(low + 1, n - 1)
        part = (at - low).reshape([-1 if i == axis else 1 for i in range(3)])
        image = image.take(low, axis) * (1 - part) + image.take(high, axis) * part
    return image


def features_by_hand(state: dict[str, torch.Tensor], image: torch.Tensor) -> np.ndarray:
    """The normalised class token of one uint8 image (3, H, W), in float64 from the weights and the papers alone."""
    w = {name: value.double().numpy() for name, value in state.items()}
    pixels = tf1_resize(image.double().numpy() / 255, 224)
    x = (pixels - np.array([0.485, 0.456, 0.406])[:, None, None]) / np.array([0.229, 0.224, 0.225])[:, None, None]
    patches = x.reshape(3, 16, 14, 16, 14).transpose(1, 3, 0, 2, 4).reshape(256, -1)
    tokens = patches @ w["patch_embed.proj.weight"].reshape(WIDTH, -1).T + w["patch_embed.proj.bias"]
    matrix = resampling(37, 16.1 / 37)
    grid = np.einsum("ij,kl,jld->ikd", matrix, matrix, w["pos_embed"][0, 1:].reshape(37, 37, WIDTH)).reshape(256, -1)
    x = np.concatenate([w["cls_token"][0] + w["pos_embed"][0, :1], tokens + grid])

    def norm(x, name):
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        return centred / deviation * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    for i in range(DEPTH):
        block = f"blocks.{i}"
        q, k, v = (
            linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").reshape(257, 3, HEADS, -1).transpose(1, 2, 0, 3)
        )
        logits = q @ k.transpose(0, 2, 1) / math.sqrt(WIDTH / HEADS)
        attention = np.exp(logits - logits.max(-1, keepdims=True))
        attention /= attention.sum(-1, keepdims=True)
        mixed = (attention @ v).transpose(1, 0, 2).reshape(257, WIDTH)
        x = x + w[f"{block}.ls1.gamma"] * linear(mixed, f"{block}.attn.proj")
        hidden = torch.from_numpy(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        hidden = (hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))).numpy()
        x = x + w[f"{block}.ls2.gamma"] * linear(hidden, f"{block}.mlp.fc2")
    return norm(x[0], "norm")


def test_features_equal_an_independent_computation(state, network):
    image = random_images(1, 61)[0]
    found = dinov2.extract(image[None], network)[0].numpy()
    expected = features_by_hand(state, image)
    assert found.shape == (WIDTH,) and expected.std() > 0.3
    np.testing.assert_allclose(found, expected, atol=2e-5)  # float32 through 12 blocks; values are of order 1


def test_the_extractor_is_torch_fidelitys_but_for_where_the_network_comes_from(network, monkeypatch):
    from torch_fidelity.feature_extractor_dinov2 import FeatureExtractorDinoV2

    asked = []
    monkeypatch.setattr(torch.hub, "load", lambda *names: asked.append(names) or network.extractor.model)
    official = FeatureExtractorDinoV2(MODEL, ["dinov2"])
    images = random_images(2, 40)
    assert torch.equal(official(images)[0], dinov2.extract(images, network))
    assert asked == [("facebookresearch/dinov2", "dinov2_vits14")]
    assert network.extractor.get_provided_features_list() == ("dinov2",)


def test_positions_of_the_right_number_stay():
    positions = torch.randn(1, 1 + 256, 8, generator=torch.Generator().manual_seed(0))
    assert dinov2._resized_positions(positions) is positions


def test_the_gated_layers_of_the_largest_model_are_metas():
    from timm.layers import SwiGLUPacked

    generator = torch.Generator().manual_seed(0)
    w12, w3, x = (torch.randn(*shape, generator=generator) for shape in ((16, 4), (4, 8), (5, 4)))
    gated = SwiGLUPacked(4, hidden_features=16, out_features=4)
    named = {
        "x.mlp.w12.weight": w12,
        "x.mlp.w12.bias": torch.ones(16),
        "x.mlp.w3.weight": w3,
        "x.mlp.w3.bias": torch.ones(4),
    }
    gated.load_state_dict({dinov2._timm_key(name).removeprefix("x.mlp."): value for name, value in named.items()})
    first, second = (x @ w12.T + 1).chunk(2, dim=1)
    torch.testing.assert_close(gated(x), first * torch.sigmoid(first) * second @ w3.T + 1)


@pytest.mark.parametrize(("model", "depth", "width"), [("dinov2-vit-l-14", 24, 1024), ("dinov2-vit-g-14", 40, 1536)])
def test_the_published_architectures_build(model, depth, width, monkeypatch):
    import timm

    # timm reads the numbers of this call back, which a network without memory cannot hold
    monkeypatch.setattr(torch, "linspace", functools.partial(torch.linspace, device="cpu"))
    with torch.device("meta"):
        network = timm.create_model(dinov2.RELEASES[model].timm_name, num_classes=0, img_size=224)
    state = network.state_dict()
    assert len(network.blocks) == depth and state["pos_embed"].shape == (1, 257, width)
    hidden = {"dinov2-vit-l-14": (4096, 4096), "dinov2-vit-g-14": (8192, 4096)}[model]  # gated: twice 4096 go in
    assert (state["blocks.0.mlp.fc1.weight"].shape[0], state["blocks.0.mlp.fc2.weight"].shape[1]) == hidden
    assert network.norm.eps == 1e-6


def fake_features(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator) * (1 + seed) + seed


def test_the_distance_is_that_of_the_formula():
    from edadm.metrics.frechet import statistics

    a, b = fake_features(40, 0).double().numpy(), fake_features(50, 1).double().numpy()
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    found = dinov2.fd_dinov2(fake_features(40, 0), statistics(fake_features(50, 1)))
    assert found == pytest.approx(expected, rel=1e-6)
    with pytest.raises(NotAvailable, match="at least 2 images, got 1"):
        dinov2.fd_dinov2(fake_features(1, 0), statistics(fake_features(50, 1)))
    with pytest.raises(EdadmError, match="the reference has 5 features, the images 6"):
        dinov2.fd_dinov2(fake_features(4, 0), statistics(fake_features(50, 1)[:, :5]))


@pytest.fixture
def counting(monkeypatch, tmp_path):
    """A stand-in for the network's pass: what is read, cropped and kept is tested without its cost."""
    monkeypatch.setenv("EDADM_CACHE", str(tmp_path / "cache"))
    passes = []

    def forward(rows, network):
        passes.append(tuple(rows.shape))
        return rows.float().mean((2, 3))

    monkeypatch.setattr(dinov2, "_forward", forward)
    return passes


def test_references_are_kept_by_content_crop_and_weights(counting, network, tmp_path):
    write_folder(random_images(3, 310), tmp_path / "set" / "class")
    first = dinov2.reference_from(tmp_path / "set", network)
    assert (first.n, first.name, first.sha256, first.size) == (3, "set", network.sha256, (310, 310))
    assert dinov2.reference_from(tmp_path / "set", network).pooled.n == 3 and len(counting) == 1
    cropped = dinov2.reference_from(tmp_path / "set", network, crop="center_300")
    assert counting[1:] == [(3, 3, 300, 300)] and cropped.protocol == "center_300"
    other = dinov2.Dinov2Network(network.extractor, MODEL, "b" * 64)
    dinov2.reference_from(tmp_path / "set", other)
    assert len(counting) == 3
    kept = next(path for path in (tmp_path / "cache" / "dinov2").iterdir() if path.suffix == ".npz")
    assert dinov2.reference_from(kept, dinov2.Dinov2Network(network.extractor, MODEL, np.load(kept)["weights_sha256"]))


def test_statistics_of_other_features_are_refused(network, tmp_path):
    np.savez(tmp_path / "inception.npz", mu=np.zeros(WIDTH), sigma=np.eye(WIDTH))
    with pytest.raises(EdadmError, match="statistics of other features than DINOv2's: give images"):
        dinov2.reference_from(tmp_path / "inception.npz", network)


def test_a_file_must_be_the_release_unless_its_checksum_is_stated(weights):
    with pytest.raises(EdadmError, match=f"expected {dinov2.RELEASES[MODEL].sha256}.*fetch https://dl.fbaipublicfiles"):
        dinov2.find_weights(MODEL, weights)
    with pytest.raises(
        EdadmError, match=r"no DINOv2 weights at .*none\.pth: fetch https://.*dinov2_vits14_pretrain\.pth and"
    ):
        dinov2.find_weights(MODEL, weights.parent / "none.pth")
    with pytest.raises(EdadmError, match="unknown DINOv2 model vitl: choose from dinov2-vit-s-14"):
        dinov2.find_weights("vitl", weights)


def test_without_network_the_message_names_the_file_to_fetch(monkeypatch, tmp_path):
    def offline(url, path, hash_prefix, progress):
        assert hash_prefix == dinov2.RELEASES["dinov2-vit-l-14"].sha256
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(
        EdadmError, match=r"download failed .*no route.*fetch https://.*dinov2_vitl14_pretrain\.pth and give"
    ):
        dinov2.load_network()


@pytest.mark.parametrize("fault", ["cut", "other size", "registers"])
def test_files_that_do_not_fit_are_named(state, weights, tmp_path, fault):
    path = tmp_path / "weights.pth"
    if fault == "cut":
        path.write_bytes(weights.read_bytes()[:-1000])
    else:
        changed = (
            {"register_tokens": torch.zeros(1, 4, WIDTH)} if fault == "registers" else {"norm.bias": torch.zeros(3)}
        )
        torch.save({**state, **changed}, path)
    with pytest.raises(EdadmError, match=r"weights\.pth"):
        dinov2.load_network(MODEL, path, hashlib.sha256(path.read_bytes()).hexdigest())


def test_loading_leaves_the_global_generator_alone(weights, network):
    before = torch.get_rng_state()
    dinov2.load_network(MODEL, weights, network.sha256)
    assert torch.equal(torch.get_rng_state(), before) and not network.extractor.training

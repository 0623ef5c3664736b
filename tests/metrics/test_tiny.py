from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edadm.errors import EdadmError
from edadm.metrics import tiny
from edadm.metrics.frechet import NotAvailable, frechet_distance, statistics

from .conftest import random_images

needs_assets = pytest.mark.skipif(
    not (tiny.WEIGHTS.exists() and tiny.REFERENCE.exists()), reason="the embedded feature network is not built"
)


@pytest.fixture(scope="module")
def reference(tiny_network):
    return tiny.build_reference(random_images(300), tiny_network, "patterns")


def test_one_pass_gives_the_networks_own_features(tiny_network):
    images = random_images(5)
    found = tiny.extract(images, tiny_network)
    with torch.no_grad():
        pooled, spatial, logits = tiny_network.model.features(images.float() / 127.5 - 1)
    # float32 convolutions of another batch size and memory layout
    torch.testing.assert_close(found.pooled, pooled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.spatial, spatial, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.logits, logits, rtol=1e-4, atol=1e-5)
    assert (len(found), found.pooled.shape[1], found.spatial.shape[1]) == (5, 129, 112)


def test_features_do_not_depend_on_what_else_is_scored(tiny_network):
    images = random_images(tiny.CHUNK + 30)
    everything = tiny.extract(images, tiny_network)
    alone = tiny.extract(images[tiny.CHUNK - 3 : tiny.CHUNK + 2], tiny_network)
    rows = slice(tiny.CHUNK - 3, tiny.CHUNK + 2)
    # the rows move to another position of a chunk of the same size: at most float32 rounding
    torch.testing.assert_close(alone.pooled, everything.pooled[rows], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alone.spatial, everything.spatial[rows], rtol=1e-5, atol=1e-6)


def test_distances_are_those_of_the_features(tiny_network, reference):
    images = random_images(200, seed=5)
    found = tiny.extract(images, tiny_network)
    assert tiny.fd_tiny(found, reference) == frechet_distance(reference.pooled, statistics(found.pooled))
    assert tiny.sfd_tiny(found, reference) == frechet_distance(reference.spatial, statistics(found.spatial))
    assert tiny.fd_tiny(found, found) == pytest.approx(0, abs=1e-6)


def test_is_tiny_is_one_for_equal_and_ten_for_confident_even_predictions():
    features = tiny.TinyFeatures(torch.zeros(20, 129), torch.zeros(20, 112), 100 * torch.eye(10).repeat(2, 1))
    assert tiny.is_tiny(features) == pytest.approx(10, rel=1e-6)
    same = tiny.TinyFeatures(features.pooled, features.spatial, torch.ones(20, 10))
    assert tiny.is_tiny(same) == pytest.approx(1)
    np.testing.assert_allclose(tiny.class_shares(features), np.full(10, 0.1))


def test_one_image_has_no_distance(tiny_network, reference):
    with pytest.raises(NotAvailable, match="at least 2 images, got 1"):
        tiny.fd_tiny(tiny.extract(random_images(1), tiny_network), reference)


def test_other_sizes_are_refused_with_a_remedy(tiny_network):
    with pytest.raises(EdadmError, match="32 x 32 images, got 16 x 16"):
        tiny.extract(random_images(2, 16), tiny_network)


def test_a_reference_survives_a_round_trip(tiny_network, reference, tmp_path):
    path = tmp_path / "new" / "reference.safetensors"
    tiny.save_reference(reference, path)
    again = tiny.load_reference(path)
    np.testing.assert_array_equal(again.pooled.covariance, reference.pooled.covariance)
    np.testing.assert_array_equal(again.spatial.mean, reference.spatial.mean)
    np.testing.assert_array_equal(again.pixel_std, reference.pixel_std)
    assert (again.n, again.name, again.sha256) == (300, "patterns", tiny_network.sha256)
    assert path.stat().st_size < 300_000


def test_pixel_moments_are_those_of_the_images(reference):
    images = random_images(300).double().numpy()
    np.testing.assert_allclose(reference.pixel_mean, images.mean(0), atol=1e-4)
    np.testing.assert_allclose(reference.pixel_std, images.std(0), atol=1e-3)


def test_weights_are_loaded_and_hashed(tiny_network, tmp_path):
    path = tmp_path / "weights.safetensors"
    half = {k: v.half() if v.is_floating_point() else v for k, v in tiny_network.model.state_dict().items()}
    save_file(half, path)
    loaded = tiny.load_network(path)
    assert len(loaded.sha256) == 64 and not loaded.model.training
    assert next(loaded.model.parameters()).dtype == torch.float32


def test_bad_files_are_named(tiny_network, reference, tmp_path):
    missing, broken = tmp_path / "missing", tmp_path / "broken"
    broken.write_bytes(b"nonsense")
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    for path in (missing, broken, other):
        with pytest.raises(EdadmError, match=path.name):
            tiny.load_network(path)
        with pytest.raises(EdadmError, match=path.name):
            tiny.load_reference(path)


def test_a_reference_of_other_weights_is_refused(tiny_network, reference):
    tiny.check_same_network(reference, tiny_network)
    with pytest.raises(EdadmError, match="build the reference again"):
        tiny.check_same_network(reference, tiny.TinyNetwork(tiny_network.model, "1" * 64))


def test_damaged_images_are_damaged(rng, reference):
    images = random_images(3)
    assert tiny.jpeg(images, 30).shape == images.shape
    assert not torch.equal(tiny.jpeg(images, 30), images)
    noise = torch.from_numpy(rng.integers(0, 256, (3, 3, 32, 32), dtype=np.uint8))
    assert tiny.blur(noise, 2.0).float().std() < noise.float().std() / 2
    drawn = tiny.pixel_gaussian(reference, 400, rng).double().mean(0).numpy()
    assert np.abs(drawn - reference.pixel_mean).mean() < 5  # standard error about 60 / sqrt(400) = 3


def test_the_ladder_names_its_rungs_in_order(tiny_network, reference, rng, monkeypatch):
    monkeypatch.setattr(tiny, "CHUNK", 10)
    ladder = tiny.sanity_ladder(random_images(20, seed=9), reference, tiny_network, rng, random_images(25, seed=8))
    assert list(ladder) == ["held_out", "jpeg_30", "blur", "fp_samples", "pixel_gaussian", "uniform_noise"]
    without = tiny.sanity_ladder(random_images(20, seed=9), reference, tiny_network, np.random.default_rng(0))
    assert "fp_samples" not in without and without["held_out"] == ladder["held_out"]
    with pytest.raises(ValueError, match="equal n"):
        tiny.sanity_ladder(random_images(20), reference, tiny_network, rng, random_images(5))


@needs_assets
def test_embedded_reference_belongs_to_the_embedded_network():
    network, reference = tiny.load_network(), tiny.load_reference()
    tiny.check_same_network(reference, network)
    assert reference.n == 50_000


@needs_assets
def test_noise_is_further_from_the_data_than_a_per_pixel_gaussian(rng):
    network, reference = tiny.load_network(), tiny.load_reference()
    gaussian = tiny.pixel_gaussian(reference, 250, rng)
    noise = torch.from_numpy(rng.integers(0, 256, tuple(gaussian.shape), dtype=np.uint8))
    distances = [tiny.fd_tiny(tiny.extract(x, network), reference) for x in (gaussian, noise)]
    assert distances[0] < distances[1]


@needs_assets
def test_sanity_ladder_grows(cifar10_test, rng):
    ladder = tiny.sanity_ladder(cifar10_test, tiny.load_reference(), tiny.load_network(), rng)
    values = list(ladder.values())
    assert values == sorted(values), ladder

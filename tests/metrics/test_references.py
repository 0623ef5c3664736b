from __future__ import annotations

import logging
import os

import numpy as np
import pytest
import torch

from edadm.errors import EdadmError
from edadm.metrics import inception, references
from edadm.metrics.crops import crop
from edadm.metrics.images import write_folder
from edadm.metrics.inception_network import InceptionNetwork
from edadm.metrics.references import ADM, FOREIGN, content_of, load_reference, open_images

from .conftest import random_images


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    monkeypatch.setenv("EDADM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "references"


def spatial_features(side: int, n: int = 30) -> torch.Tensor:
    """Features as Inception's: (n, 7, side, side), every channel and position with a mean of its own."""
    generator = torch.Generator().manual_seed(0)
    means, x = (torch.rand(*shape, 7, side, side, generator=generator, dtype=torch.float64) for shape in ((), (n,)))
    return means + x


def adm_file(path, side: int = 17, **more) -> np.ndarray:
    """Write statistics as ADM's evaluator does, from channels-last features; return ours."""
    x = spatial_features(side)
    theirs, ours = x.permute(0, 2, 3, 1).reshape(len(x), -1).numpy(), x.reshape(len(x), -1).numpy()
    fields = {"mu": np.arange(4.0), "sigma": np.eye(4)}
    np.savez(path, **fields, mu_s=theirs.mean(0), sigma_s=np.cov(theirs, rowvar=False), **more)
    return ours


def test_adms_spatial_statistics_are_put_into_our_order(tmp_path):
    ours = adm_file(tmp_path / "VIRTUAL_imagenet256.npz")
    reference = load_reference(tmp_path / "VIRTUAL_imagenet256.npz")
    np.testing.assert_allclose(reference.spatial.mean, ours.mean(0), rtol=1e-12)
    np.testing.assert_allclose(reference.spatial.covariance, np.cov(ours, rowvar=False), atol=1e-12)
    assert (reference.name, reference.protocol, reference.n) == ("VIRTUAL_imagenet256", ADM, 0)
    references.save_reference(reference, tmp_path / "kept.npz")  # in our order: it must not be turned again
    again = load_reference(tmp_path / "kept.npz")
    assert np.array_equal(again.spatial.mean, reference.spatial.mean) and again.protocol == ADM


def test_statistics_without_a_name_are_another_programs(tmp_path, caplog):
    np.savez(tmp_path / "fid.npz", mu=np.zeros(4), sigma=np.eye(4))
    with caplog.at_level(logging.WARNING):
        assert load_reference(tmp_path / "fid.npz").protocol == FOREIGN
    assert "with which weights" in caplog.text


NETWORK = InceptionNetwork(torch.nn.Linear(1, 1), "a" * 64)  # never run: see passes


@pytest.fixture
def passes(monkeypatch):
    """A stand-in for Inception's pass, the mean colour of an image as its features: what is read and kept is tested."""
    seen = []

    def forward(rows, network):
        seen.append(tuple(rows.shape))
        x = rows.float().mean((2, 3))
        return x, x[:, :2], x[:, :1]

    monkeypatch.setattr(inception, "_forward", forward)
    return seen


def test_adms_images_give_the_features_that_statistics_lack(tmp_path, passes, monkeypatch):
    monkeypatch.setattr(references, "SPATIAL_SIDE", 2)
    images = random_images(5, 8)
    adm_file(tmp_path / "adm.npz", side=2, arr_0=images.permute(0, 2, 3, 1).numpy())
    plain = inception.reference_from(tmp_path / "adm.npz", NETWORK, cache=tmp_path)
    assert plain.features is None and not passes
    kept = inception.reference_from(tmp_path / "adm.npz", NETWORK, keep_features=True, cache=tmp_path)
    torch.testing.assert_close(kept.features, images.float().mean((2, 3)))
    assert kept.protocol == ADM and np.array_equal(kept.pooled.mean, np.arange(4.0))  # the statistics stay theirs


def test_a_batch_of_images_is_a_reference(tmp_path, passes):
    images = random_images(5, 8)
    np.savez(tmp_path / "samples.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    reference = inception.reference_from(tmp_path / "samples.npz", NETWORK, cache=tmp_path)
    np.testing.assert_allclose(reference.pooled.mean, images.double().mean((0, 2, 3)), rtol=1e-6)  # float32 features
    assert (reference.n, reference.name, reference.size) == (5, "samples", (8, 8))
    for name, array in {"floats": np.zeros((5, 8, 8, 3)), "one": np.zeros((1, 8, 8, 3), np.uint8)}.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=array)
        with pytest.raises(EdadmError, match=rf"arr_0 of .*{name}\.npz"):
            inception.reference_from(tmp_path / f"{name}.npz", NETWORK, cache=tmp_path)
    np.savez(tmp_path / "nothing.npz", other=np.zeros(3))
    with pytest.raises(EdadmError, match="neither statistics"):
        inception.reference_from(tmp_path / "nothing.npz", NETWORK, cache=tmp_path)


def test_a_folder_is_cropped_as_named_and_the_protocol_kept(tmp_path, passes):
    pictures = [random_images(1, 310)[0], random_images(1, 420, seed=1)[0]]
    for start, picture in enumerate(pictures):
        write_folder(picture[None], tmp_path / "set" / "class", start)
    found = inception.reference_from(tmp_path / "set", NETWORK, recursive=True, cache=tmp_path, crop="center_300")
    expected = torch.stack([crop(picture, "center_300") for picture in pictures]).double().mean((0, 2, 3))
    np.testing.assert_allclose(found.pooled.mean, expected, rtol=1e-6)
    assert passes == [(2, 3, 300, 300)] and (found.protocol, found.size, found.n) == ("center_300", (300, 300), 2)
    again = inception.reference_from(tmp_path / "set", NETWORK, recursive=True, cache=tmp_path, crop="center_300")
    assert len(passes) == 1 and again.protocol == "center_300" and again.size == (300, 300)
    other = inception.reference_from(tmp_path / "set", NETWORK, recursive=True, cache=tmp_path, crop="center_256")
    assert len(passes) == 2 and other.protocol == "center_256"


def test_images_of_several_sizes_need_a_crop_before_anything_is_computed(tmp_path):
    write_folder(random_images(2, 8), tmp_path / "set")
    write_folder(random_images(1, 9), tmp_path / "set", start=2)
    with pytest.raises(EdadmError, match=r"000002\.png has shape \(3, 9, 9\), 000000\.png \(3, 8, 8\).*center_256"):
        content_of(tmp_path / "set")
    with pytest.raises(EdadmError, match=r"000002\.png has shape"):
        open_images(tmp_path / "set")
    assert content_of(tmp_path / "set", "center_256") and len(open_images(tmp_path / "set", crop="adm_256").images) == 3


def test_content_is_hashed_once_and_again_after_a_change(tmp_path, memory, monkeypatch):
    write_folder(random_images(3, 8), tmp_path / "set" / "a")
    first = content_of(tmp_path / "set")
    reads = []
    digest = references.file_sha256
    monkeypatch.setattr(references, "file_sha256", lambda path: reads.append(path) or digest(path))
    assert content_of(tmp_path / "set") == first and not reads
    path = tmp_path / "set" / "a" / "000001.png"
    old = path.stat()
    write_folder(random_images(1, 8, seed=5), path.parent, start=1)
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns + 1_000_000))
    assert content_of(tmp_path / "set") != first and len(reads) == 3
    for file in memory.iterdir():
        file.write_text("broken")
    assert content_of(tmp_path / "set") != first and len(reads) == 6


def test_sources_that_are_no_reference_are_named(tmp_path):
    with pytest.raises(EdadmError, match=r"no reference at .*missing: give a folder"):
        content_of(tmp_path / "missing")
    write_folder(random_images(1, 8), tmp_path / "one")
    with pytest.raises(EdadmError, match="has 1 image: the statistics of a reference need at least 2"):
        content_of(tmp_path / "one")
    with pytest.raises(EdadmError, match="unknown crop square"):
        content_of(tmp_path / "one", "square")
    assert content_of("cifar10-train") == "cifar10-train"


def test_a_reference_of_few_images_is_a_trial(tmp_path, caplog):
    write_folder(random_images(3, 8), tmp_path / "set")
    with caplog.at_level(logging.WARNING):
        references.check(tmp_path / "set", None, (8, 8), features=3)
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        references.check(tmp_path / "set", None, (8, 8), features=2048)
    assert "has 3 images, fewer than the 2048 features compared" in caplog.text


def test_a_reference_of_another_size_needs_a_crop(tmp_path):
    write_folder(random_images(2, 8), tmp_path / "set")
    np.savez(tmp_path / "batch.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8))
    for source in (tmp_path / "set", tmp_path / "batch.npz"):
        references.check(source, "center_256", (256, 256))
        with pytest.raises(EdadmError, match=r"are 8 x 8, the scored ones 9 x 16: give .*metrics\.crop \(center_256"):
            references.check(source, None, (16, 9))
    references.check("cifar10-train", None, (32, 32))
    with pytest.raises(EdadmError, match="cifar10-train are 32 x 32"):
        references.check("cifar10-train", None, (64, 64))


def test_statistics_of_another_network_are_named(tmp_path):
    np.savez(tmp_path / "fid.npz", mu=np.zeros(4), sigma=np.eye(4))
    references.check(tmp_path / "fid.npz", None, (8, 8))
    with pytest.raises(EdadmError, match="statistics of 4 features, the images have 2048"):
        references.check(tmp_path / "fid.npz", None, (8, 8), features=2048)

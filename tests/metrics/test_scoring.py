from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edadm.errors import EdadmError
from edadm.metrics import clip, dinov2, inception, paired, tiny
from edadm.metrics.bootstrap import frechet_difference
from edadm.metrics.images import read_file, writing_file
from edadm.metrics.registry import METRICS
from edadm.metrics.scored_images import PART, Reference, ScoredImages
from edadm.metrics.scoring import _SCORERS, _forget, score

from .conftest import random_images

TINY = ["fd_tiny", "sfd_tiny", "is_tiny", "fd_tiny_to_fp"]
INCEPTION = ["fid", "fid_infinity", "sfid", "is", "kid", "precision", "recall"]


@pytest.fixture(scope="module")
def reference(tiny_network) -> Reference:
    return Reference(tiny=tiny.build_reference(random_images(300), tiny_network, "patterns"))


@pytest.fixture(scope="module")
def fp() -> torch.Tensor:
    return random_images(300, seed=1)


@pytest.fixture(scope="module")
def images(fp) -> torch.Tensor:
    return tiny.jpeg(fp, 20)


def test_every_metric_has_a_scorer_and_a_direction():
    assert _SCORERS.keys() == METRICS.keys()
    for name, info in METRICS.items():
        assert info.title and info.version >= 1
        assert info.proxy == ("tiny" in name)
        assert not info.proxy or "FID" not in info.title


def test_one_pass_serves_all_metrics_in_the_order_asked(images, fp, reference, tiny_network, monkeypatch):
    passes = []
    extract = tiny.extract
    monkeypatch.setattr(tiny, "extract", lambda rows, network: passes.append(len(rows)) or extract(rows, network))
    found = score(images, [*reversed(TINY), "psnr", "ssim"], reference, fp, tiny_network=tiny_network, resamples=20)
    assert list(found) == [*reversed(TINY), "psnr", "ssim"]
    assert passes == [300, 300]  # the images and the full-precision images
    json.dumps(found, allow_nan=False)


def test_values_are_those_of_the_functions(images, fp, reference, tiny_network):
    found = score(images, [*TINY, "psnr", "ssim"], reference, fp, tiny_network=tiny_network, resamples=20, seed=3)
    a, b = tiny.extract(images, tiny_network), tiny.extract(fp, tiny_network)
    assert found["fd_tiny"]["value"] == tiny.fd_tiny(a, reference.tiny)
    assert found["sfd_tiny"]["value"] == tiny.sfd_tiny(a, reference.tiny)
    assert found["is_tiny"]["value"] == tiny.is_tiny(a)
    assert found["fd_tiny_to_fp"]["value"] == tiny.fd_tiny(a, b)
    assert found["psnr"]["value"] == pytest.approx(paired.psnr(fp, images).mean())
    assert found["ssim"]["interval"][0] < found["ssim"]["value"] < found["ssim"]["interval"][1]
    expected = frechet_difference(a.pooled, b.pooled, reference.tiny.pooled, np.random.default_rng(3), 20)
    difference = found["fd_tiny"]["difference_to_fp"]
    assert difference["value"] == expected.at_n.value and difference["corrected"] == expected.corrected.value
    assert difference["corrected_interval"] == [expected.corrected.low, expected.corrected.high]


def test_a_result_names_its_protocol(images, reference, tiny_network):
    found = score(images, ["fd_tiny"], reference, tiny_network=tiny_network)["fd_tiny"]
    assert (found["n"], found["reason"], found["interval"]) == (300, None, None)
    assert (found["reference"], found["reference_n"]) == ("patterns", 300)
    assert (found["network"], found["network_sha256"]) == ("cifar10_tiny_features", tiny_network.sha256)
    assert (found["title"], found["higher_is_better"], found["proxy"], found["version"]) == ("FD-tiny", False, True, 1)
    assert "difference_to_fp" not in found


def test_the_full_precision_row_has_no_paired_values(images, reference, tiny_network):
    paired_names = [name for name, info in METRICS.items() if info.kind == "paired"]
    for result in score(images[:4], paired_names, reference, tiny_network=tiny_network).values():
        assert result["value"] is None and "to compare with" in result["reason"]


def test_one_image_gives_reasons_instead_of_values(reference, tiny_network):
    one = random_images(1, seed=4)
    found = score(
        one,
        ["fd_tiny", "sfd_tiny", "fd_tiny_infinity", "ssim"],
        reference,
        random_images(1, seed=5),
        tiny_network=tiny_network,
    )
    assert "at least 2 images, got 1" in found["fd_tiny"]["reason"]
    assert found["sfd_tiny"]["value"] is None
    assert "at least 260 images" in found["fd_tiny_infinity"]["reason"]
    assert found["ssim"]["value"] is not None and found["ssim"]["interval"] is None


def test_extrapolation_is_given_where_images_suffice(images, reference, tiny_network):
    assert (
        score(images, ["fd_tiny_infinity"], reference, tiny_network=tiny_network)["fd_tiny_infinity"]["value"]
        is not None
    )


def test_sqnr_carries_its_curve(images, reference, tiny_network):
    steps = paired.StepSQNR((5, 0), np.full((2, 6), 100.0), np.full((2, 6), 1.0))
    found = score(images, ["sqnr"], reference, step_sqnr=steps)["sqnr"]
    assert (found["value"], found["n"], found["per_step"], found["unit"]) == (20, 6, [20, 20], "dB")


def test_seeds_fix_the_intervals_whatever_else_is_asked(images, fp, reference, tiny_network):
    alone = score(images, ["psnr"], reference, fp)["psnr"]
    among = score(images, ["ssim", "psnr"], reference, fp)["psnr"]
    other = score(images, ["psnr"], reference, fp, seed=1)["psnr"]
    assert alone == among and alone["interval"] != other["interval"]


def test_impossible_requests_say_what_is_missing(images, reference, tiny_network):
    with pytest.raises(EdadmError, match="unknown metric fidd: choose from fid, "):
        score(images, ["fidd"], reference)
    with pytest.raises(EdadmError, match=r"need Reference\.tiny"):
        score(images, ["fd_tiny"], Reference(), tiny_network=tiny_network)
    with pytest.raises(EdadmError, match="need inception_network"):
        score(images, ["is"], reference)
    with pytest.raises(EdadmError, match="same noise and number"):
        score(images, ["psnr"], reference, images[:3])
    with pytest.raises(EdadmError, match="build the reference again"):
        score(images, ["fd_tiny"], reference, tiny_network=tiny.TinyNetwork(tiny_network.model, "9" * 64))


def test_inception_metrics_share_one_pass(inception_network, monkeypatch):
    rng = np.random.default_rng(0)
    passes = []

    def extract(rows, network):
        passes.append(len(rows))
        return inception.InceptionFeatures(
            *(torch.from_numpy(rng.random((len(rows), d), np.float32)) for d in (6, 5, 4))
        )

    def forward(rows, network):
        return tuple(torch.from_numpy(rng.random((len(rows), d), np.float32)) for d in (6, 5, 4))

    monkeypatch.setattr(inception, "extract", extract)
    monkeypatch.setattr(inception, "_forward", forward)
    real = inception.build_reference(random_images(40, 8), inception_network, "real", keep_features=True)
    found = score(random_images(30, 8), INCEPTION, Reference(inception=real), inception_network=inception_network)
    assert passes == [30]
    assert [name for name in INCEPTION if found[name]["value"] is None] == ["kid"]
    assert "at least 1000" in found["kid"]["reason"]
    assert found["fid"]["reference_n"] == 40 and "not comparable" in found["fid"]["note"]
    assert found["fid"]["network_sha256"] == inception_network.sha256
    json.dumps(found, allow_nan=False)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation makes."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return made


def test_no_tensor_grows_with_the_number_of_images(tmp_path, monkeypatch):
    monkeypatch.setattr(paired, "CHUNK", 10)
    with writing_file(tmp_path / "images.npy", 900) as append:
        append(random_images(900, 16))
    images = read_file(tmp_path / "images.npy")

    def largest(n: int) -> int:
        with Largest() as mode:
            score(images[:n], ["psnr", "ssim"], Reference(), images[-n:], resamples=2)
        return mode.nbytes

    assert largest(800) == largest(100) < images[:800].nbytes


def test_images_are_cropped_and_given_to_feature_networks_in_parts(reference, monkeypatch):
    class Network:
        sha256, name = "0" * 64, "sizes"

    def embeddings(images, network):
        seen.append(tuple(images.shape))
        return images[:, :, 0, 0].float()

    seen = []
    monkeypatch.setattr(clip, "image_embeddings", embeddings)
    images = random_images(PART + 3, 4)
    run = ScoredImages(images, None, reference, *[None] * 6, (), "center_300", None, 0, 2, _forget)
    assert run.embeddings(Network()).shape == (PART + 3, 3)
    assert seen == [(PART, 3, 300, 300), (3, 3, 300, 300)]
    assert PART % clip.BATCH == 0 and PART % dinov2.BATCH == 0 and PART % 64 == 0

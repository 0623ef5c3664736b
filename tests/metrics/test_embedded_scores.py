"""CLIP score, aesthetic score and FD-DINOv2 as ``scoring.score`` gives them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from edadm.errors import EdadmError
from edadm.metrics import aesthetic, bootstrap, clip, dinov2, inception, tiny
from edadm.metrics.crops import crop_all
from edadm.metrics.inception_network import InceptionNetwork
from edadm.metrics.references import FeatureReference
from edadm.metrics.scored_images import Reference
from edadm.metrics.scoring import score

from .conftest import random_images
from .small_clip import EMBED, write_clip

PROMPTS = ["a cat", "a dog", "a red car", "a bridge", "a ship", "a frog"]
IMAGES = random_images(6, 32)
FP = tiny.jpeg(IMAGES, 10)


@pytest.fixture(scope="module")
def network(tmp_path_factory) -> clip.ClipNetwork:
    return clip.load_network(f"local-dir:{write_clip(tmp_path_factory.mktemp('clip') / 'small')}", None)


@pytest.fixture
def rating(network) -> aesthetic.AestheticNetwork:
    weight = torch.arange(EMBED, dtype=torch.float64)
    return aesthetic.AestheticNetwork(network, aesthetic.Head(weight, 5.0, "ramp", "c" * 64))


def values(images: torch.Tensor, network: clip.ClipNetwork) -> np.ndarray:
    return clip.scores(clip.image_embeddings(images, network), clip.text_embeddings(PROMPTS, network))


def test_clip_score_is_the_mean_over_pairs_and_names_its_model(network):
    found = score(IMAGES, ["clip"], Reference(), FP, clip_network=network, prompts=PROMPTS, seed=3)["clip"]
    expected, fp = values(IMAGES, network), values(FP, network)
    assert found["value"] == expected.mean() and found["n"] == 6
    interval = bootstrap.mean_interval(expected, np.random.default_rng(3))
    assert found["interval"] == [interval.low, interval.high]
    paired = bootstrap.mean_interval(expected - fp, np.random.default_rng(3))
    assert found["difference_to_fp"] == {"value": paired.value, "interval": [paired.low, paired.high]}
    assert (found["network"], found["network_sha256"]) == ("small", network.sha256)
    assert (found["title"], found["kind"], found["higher_is_better"]) == ("CLIP score", "set", True)
    json.dumps(found, allow_nan=False)


def test_every_image_meets_its_own_prompt(network):
    ordered = score(IMAGES, ["clip"], Reference(), clip_network=network, prompts=PROMPTS)["clip"]
    turned = score(IMAGES, ["clip"], Reference(), clip_network=network, prompts=PROMPTS[::-1])["clip"]
    both = score(IMAGES.flip(0), ["clip"], Reference(), clip_network=network, prompts=PROMPTS[::-1])["clip"]
    assert turned["value"] != pytest.approx(ordered["value"], abs=1e-3)
    assert both["value"] == pytest.approx(ordered["value"], abs=1e-4)  # float32 embeddings, another order of sums
    assert "difference_to_fp" not in ordered


def test_one_clip_model_embeds_once_for_both_scores(network, rating, monkeypatch):
    passes = []
    embed = clip.image_embeddings
    monkeypatch.setattr(clip, "image_embeddings", lambda rows, net: passes.append(len(rows)) or embed(rows, net))
    options = {"clip_network": network, "aesthetic_network": rating, "prompts": PROMPTS}
    found = score(IMAGES, ["clip", "aesthetic"], Reference(), FP, **options)
    assert passes == [6, 6]  # the images and the full-precision images
    rated = aesthetic.scores(embed(IMAGES, network), rating.head)
    assert found["aesthetic"]["value"] == pytest.approx(rated.mean(), rel=1e-12)
    difference = rated.mean() - aesthetic.scores(embed(FP, network), rating.head).mean()
    assert found["aesthetic"]["difference_to_fp"]["value"] == pytest.approx(difference, rel=1e-9)
    assert found["aesthetic"]["network"] == "small, head ramp" and found["aesthetic"]["head_sha256"] == "c" * 64


def test_images_are_cropped_for_features_and_for_nothing_else(network):
    images, fp = random_images(2, 320), random_images(2, 320, seed=1)
    options = {"clip_network": network, "prompts": PROMPTS[:2]}
    found = score(images, ["clip", "psnr"], Reference(), fp, crop="center_300", **options)
    expected = clip.scores(
        clip.image_embeddings(crop_all(images, "center_300"), network), clip.text_embeddings(PROMPTS[:2], network)
    )
    assert found["clip"]["value"] == expected.mean()
    assert found["psnr"] == score(images, ["psnr"], Reference(), fp)["psnr"]


@pytest.fixture
def colours(monkeypatch) -> dinov2.Dinov2Network:
    """A network whose features are mean colours, so that the distance can be written down."""
    monkeypatch.setattr(dinov2, "_forward", lambda rows, network: rows.float().mean((2, 3)))
    return dinov2.Dinov2Network(torch.nn.Linear(1, 1), "dinov2-vit-s-14", "d" * 64)  # type: ignore[arg-type]


def test_fd_dinov2_names_reference_and_protocol(colours):
    reference = dinov2.build_reference(FP, colours, "jpegs")
    found = score(IMAGES, ["fd_dinov2"], Reference(dinov2=reference), dinov2_network=colours)["fd_dinov2"]
    x, y = (images.double().mean((2, 3)).numpy() for images in (IMAGES, FP))
    eigenvalues = np.linalg.eigvals(np.cov(x, rowvar=False) @ np.cov(y, rowvar=False)).real
    overlap = np.sqrt(eigenvalues.clip(0)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.cov(x.T).trace() + np.cov(y.T).trace() - 2 * overlap
    assert found["value"] == pytest.approx(expected, rel=1e-4)  # float32 features
    assert (found["reference"], found["reference_n"], found["network"]) == ("jpegs", 6, "dinov2-vit-s-14")
    assert found["network_sha256"] == "d" * 64 and "reference_protocol" not in found
    one = score(IMAGES[:1], ["fd_dinov2"], Reference(dinov2=reference), dinov2_network=colours)["fd_dinov2"]
    assert one["value"] is None and "at least 2 images" in one["reason"]


def test_the_protocol_of_a_reference_is_in_the_result(monkeypatch):
    statistics = inception.Statistics(np.zeros(3), np.eye(3), 0)
    reference = FeatureReference(statistics, None, None, 0, "adm", None, "center_300", (300, 300))
    monkeypatch.setattr(inception, "_forward", lambda rows, network: (rows.float().mean((2, 3)),) * 3)
    network = InceptionNetwork(torch.nn.Linear(1, 1), "e" * 64)  # type: ignore[arg-type]
    options = {"inception_network": network, "crop": "center_300"}
    found = score(random_images(3, 310), ["fid"], Reference(inception=reference), **options)["fid"]
    assert (found["reference"], found["reference_protocol"]) == ("adm", "center_300")
    with pytest.raises(EdadmError, match=r"reference 'adm' are 300 x 300, the scored ones 310 x 310.*metrics\.crop"):
        score(random_images(3, 310), ["fid"], Reference(inception=reference), inception_network=network)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "clip needs prompts: the list is empty, expected one prompt for each of 6 images"),
        ([], "the list is empty"),
        (PROMPTS[:5], "5 prompts for 6 images"),
        (["a", 3, "c", "d", "e", "f"], "a list of texts"),
    ],
)
def test_prompts_that_do_not_pair_up_are_refused_before_any_feature(network, prompts, message):
    with pytest.raises(EdadmError, match=message):
        score(IMAGES, ["psnr", "clip"], Reference(), FP, clip_network=network, prompts=prompts)


@pytest.mark.parametrize("name", ["clip", "aesthetic", "fd_dinov2"])
def test_a_network_that_is_not_given_is_named(name):
    with pytest.raises(EdadmError, match=f"{name} needs {name.removeprefix('fd_')}_network"):
        score(IMAGES, [name], Reference(), prompts=PROMPTS)


def test_a_reference_that_is_not_given_is_named(colours):
    with pytest.raises(EdadmError, match=r"fd_dinov2 needs Reference\.dinov2"):
        score(IMAGES, ["fd_dinov2"], Reference(), dinov2_network=colours)

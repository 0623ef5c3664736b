"""Runs that score a folder of images by the metrics of large networks, here small ones with random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from edadm import config, experiment, records
from edadm.errors import EdadmError
from edadm.keys import Run
from edadm.metrics import aesthetic, clip
from edadm.metrics.images import write_folder
from tests.metrics.conftest import random_images
from tests.metrics.small_clip import EMBED, write_clip

Toy = Callable[..., Run]
PROMPTS = ["a cat", "a dog", "a red car"]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Score three images and their prompts by a small CLIP."""
    write_folder(random_images(3, 16), tmp_path / "images")
    write_clip(tmp_path / "small")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return [
        f"images={tmp_path / 'images'}", "metrics=clip", "metrics.names=[clip]", f"metrics.clip.prompts={tmp_path}/prompts.txt",
        f"metrics.clip.model=local-dir:{tmp_path}/small", "metrics.clip.pretrained=null",
    ]  # fmt: skip


def test_a_folder_and_its_prompts_end_in_a_record(toy: Toy, words: list[str], tmp_path: Path) -> None:
    run = toy(*words)
    result = records.read(experiment.execute(run)).metrics["clip"]
    network = clip.load_network(f"local-dir:{tmp_path}/small", None)
    images = clip.image_embeddings(random_images(3, 16), network)
    assert result["value"] == clip.scores(images, clip.text_embeddings(PROMPTS, network)).mean()
    assert (result["n"], result["network"]) == (3, "small")
    protocol = run.protocol["clip"]
    assert protocol["model"] == "small" and protocol["weights"] == network.sha256
    assert str(tmp_path) not in str(protocol)


def test_prompts_and_weights_are_part_of_the_hash(toy: Toy, words: list[str], tmp_path: Path) -> None:
    first = toy(*words).hash
    (tmp_path / "prompts.txt").write_text("a cat\na dog\na blue car\n", encoding="utf-8")
    assert toy(*words).hash != first
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    assert toy(*words).hash == first
    (tmp_path / "small").rename(tmp_path / "old")
    write_clip(tmp_path / "small", seed=1)
    assert toy(*words).hash != first


def test_fewer_images_take_the_first_prompts(toy: Toy, words: list[str]) -> None:
    assert toy(*words, "n_images=2").prompts == PROMPTS[:2]
    assert toy(*words, "n_images=50").prompts == PROMPTS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no prompts"),
        (b"a cat\na dog\n", "2 prompts for 3 images"),
        (b"a cat\na dog\na car\na ship\n", "4 prompts for 3 images"),
        (b"a cat\na dog\n\xff\n", "not UTF-8"),
    ],
)
def test_a_wrong_list_is_refused_before_anything_is_computed(
    toy: Toy, words: list[str], tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(EdadmError, match=message):
        toy(*words)
    assert not list((tmp_path / "results").glob("**/*.json"))


def test_missing_settings_are_named_before_anything_is_computed(toy: Toy, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(
        EdadmError, match=r"images of task cifar10_tiny have no prompts of their own: give metrics\.clip"
    ):
        toy(*words[:3], *words[4:])
    with pytest.raises(EdadmError, match=r"needs the settings metrics\.clip: choose metrics=clip"):
        toy(words[0], "metrics.names=[clip]")
    with pytest.raises(EdadmError, match=r"metrics\.dinov2\.reference is not set"):
        toy(words[0], "metrics=dinov2", "metrics.names=[fd_dinov2]")
    with pytest.raises(EdadmError, match="unknown crop square"):
        toy(words[0], "metrics.crop=square")
    with pytest.raises(EdadmError, match="no reference at /nowhere"):
        toy(words[0], "metrics=dinov2", "metrics.names=[fd_dinov2]", "metrics.dinov2.reference=/nowhere")
    with pytest.raises(
        EdadmError, match=r"no CLIP weights at .*gone\.safetensors: fetch open_clip_model\.safetensors of timm"
    ):
        toy(words[0], "metrics=aesthetic", "metrics.names=[aesthetic]", "metrics.aesthetic.weights=gone.safetensors")


def test_the_aesthetic_score_of_a_folder(
    toy: Toy, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aesthetic, "ENCODER", (f"local-dir:{tmp_path}/small", None))
    head = {"weight": torch.ones(1, EMBED), "bias": torch.tensor([5.0])}
    save_file(head, tmp_path / "head.safetensors")
    run = toy(
        words[0],
        "metrics=aesthetic",
        "metrics.names=[aesthetic]",
        f"metrics.aesthetic.head={tmp_path}/head.safetensors",
    )
    result = records.read(experiment.execute(run)).metrics["aesthetic"]
    network = clip.load_network(f"local-dir:{tmp_path}/small", None)
    expected = 5 + clip.image_embeddings(random_images(3, 16), network).double().sum(1).mean()
    assert result["value"] == pytest.approx(float(expected), rel=1e-12)
    assert run.protocol["aesthetic"]["head"] == "head"


class Captions:
    """Conditions of a text-to-image task, as far as their prompts go."""

    null = None

    def rows(self, stream: str, seed: int, numbers: Sequence[int]) -> dict[str, torch.Tensor]:
        raise AssertionError("nothing is sampled")

    def identity(self, stream: str) -> dict[str, Any]:
        return {"captions": 1}

    def prompts(self, stream: str, seed: int, numbers: Sequence[int]) -> list[str]:
        return [f"{stream} {seed} {number}" for number in numbers]


def test_a_text_task_brings_its_own_prompts(toy: Toy) -> None:
    run = toy()
    task = dataclasses.replace(run.task, conditions=Captions)
    values = {**run.settings.values, "metrics": toy("metrics=clip").settings["metrics"]}
    values["metrics"]["names"], values["n_images"] = ["clip"], 2
    run = dataclasses.replace(run, task=task, settings=dataclasses.replace(run.settings, values=values))
    assert run.prompts == ["evaluation 1234 0", "evaluation 1234 1"]


@pytest.mark.parametrize("name", config.options("metrics"))
def test_every_file_of_metrics_has_the_settings_of_what_it_names(name: str) -> None:
    settings = config.compose([f"metrics={name}"]).metrics
    needs = {"clip": "clip", "aesthetic": "aesthetic", "fd_dinov2": "dinov2"}
    assert all(section in settings for metric, section in needs.items() if metric in settings.names)
    assert {"crop", "bootstrap", "sqnr_rows", "reference", "inception"} <= set(settings)

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from edadm import config
from edadm.errors import EdadmError
from edadm.keys import Run
from edadm.metrics import clip, clip_tiny, networks
from edadm.metrics.registry import METRICS
from edadm.metrics.scored_images import Reference
from edadm.metrics.scoring import score
from edadm.store import Store
from experiments.training.tokenizer import open_clip_tokenizer
from tests.tasks.narrow_latent import CLIP, PREPROCESS, clip_folder

from .conftest import random_images

PROMPTS = ["a photo of a cat", "this is an airplane", "a ship on the moon"]  # the moon is spelled in letters


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("clip") / "small")


@pytest.fixture
def embedded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(clip_tiny, "FOLDER", folder)
    return folder


def direct(folder: Path, images: torch.Tensor) -> list[float]:
    """100 max(cos, 0), with open_clip's model called on pixels and tokens made here."""
    import open_clip

    tokenizer = open_clip_tokenizer(folder / clip.VOCABULARY, 16)
    model = open_clip.CLIP(**(CLIP | {"text_cfg": CLIP["text_cfg"] | {"vocab_size": tokenizer.vocab_size}})).eval()
    model.load_state_dict(load_file(folder / clip.FILES[0]))
    mean, std = (torch.tensor(PREPROCESS[name])[:, None, None] for name in ("mean", "std"))
    with torch.no_grad():
        seen, read = model.encode_image((images / 255 - mean) / std), model.encode_text(tokenizer(PROMPTS))
    return [100 * max(0.0, float(torch.cosine_similarity(a, b, dim=0))) for a, b in zip(seen, read)]


def test_it_is_the_clip_score_under_the_small_model(embedded: Path) -> None:
    images = random_images(3)
    found = score(images, ["clip_tiny"], Reference(), random_images(3, seed=1), prompts=PROMPTS)["clip_tiny"]
    expected = direct(embedded, images)
    assert found["value"] == pytest.approx(np.mean(expected), abs=1e-3) and max(expected) > 0
    assert found["interval"][0] <= found["value"] <= found["interval"][1] and found["proxy"]
    before = np.mean(direct(embedded, random_images(3, seed=1)))
    assert found["difference_to_fp"]["value"] == pytest.approx(np.mean(expected) - before, abs=1e-3)
    weights = (embedded / clip.FILES[0]).read_bytes()
    assert (found["network"], found["network_sha256"]) == ("small", hashlib.sha256(weights).hexdigest())


def test_it_is_a_proxy_and_never_called_clip_score() -> None:
    assert METRICS["clip_tiny"].proxy and "score" not in METRICS["clip_tiny"].title


def test_it_needs_a_prompt_for_each_image(embedded: Path) -> None:
    with pytest.raises(EdadmError, match="clip_tiny needs prompts"):
        score(random_images(3), ["clip_tiny"], Reference(), prompts=PROMPTS[:2])


def test_keys_name_weights_and_prompts_and_nothing_else(embedded: Path) -> None:
    found = networks.identities({}, ["clip_tiny"], PROMPTS)
    assert found["clip_tiny"]["weights"] == clip_tiny.sha256() and found.keys() == {"clip_tiny"}
    assert networks.identities({}, ["clip_tiny"], PROMPTS[:2]) != found
    loaded = networks.load({}, ["clip_tiny"], "cpu")
    assert loaded.clip is None and loaded.clip_tiny.sha256 == clip_tiny.sha256()


def test_images_of_a_folder_are_scored_with_prompts_of_a_file(embedded: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["metrics=tiny_clip", "metrics.names=[clip_tiny]", f"metrics.clip_tiny.prompts={tmp_path / 'prompts.txt'}"]
    words += ["n_images=2", "device=cpu"]
    settings = config.settings(config.compose(words), words)
    from edadm.tasks.cifar10_tiny import cifar10_tiny

    run = Run(settings, cifar10_tiny(), Store(), "cpu", 1)
    assert run.prompts == PROMPTS[:2] and not run.needs_tiny
    without = config.settings(config.compose(words[:2]), words[:2])
    with pytest.raises(EdadmError, match=r"give metrics\.clip_tiny\.prompts"):
        _ = Run(without, cifar10_tiny(), Store(), "cpu", 1).prompts


def test_without_the_model_the_message_names_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_tiny, "FOLDER", tmp_path / "nowhere")
    with pytest.raises(EdadmError, match=r"no small CLIP at .*experiments\.train_tiny clip --export"):
        clip_tiny.load_network()


def test_a_vocabulary_that_is_too_large_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(folder, tmp_path / "clip")
    given = json.loads((copy / clip.CONFIG).read_text())
    state = load_file(copy / clip.FILES[0])
    given["model_cfg"]["text_cfg"]["vocab_size"] = 100
    state["token_embedding.weight"] = state["token_embedding.weight"][:100].clone()
    from safetensors.torch import save_file

    save_file(state, copy / clip.FILES[0])
    (copy / clip.CONFIG).write_text(json.dumps(given))
    with pytest.raises(EdadmError, match=r"knows 100 tokens, its tokenizer has \d+: put the bpe\.txt\.gz"):
        clip.load_network(f"{clip.LOCAL}{copy}", None)

"""What of a hub repository is on this machine: a partial download is completed, a variant is no replacement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from edadm.errors import EdadmError
from edadm.tasks import cifar10_ddim, dit, weights
from edadm.tasks.model_folder import load_model
from tests.toys import tiny_unet

NAME = "somebody/something"


@pytest.fixture
def snapshot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder in which the hub's client keeps its copy of a repository."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--somebody--something"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    folder = repository / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    return folder


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_a_repository_is_here_when_every_part_is(snapshot: Path) -> None:
    parts = cifar10_ddim.PARTS["path"]
    put(snapshot, "config.json", "diffusion_pytorch_model.fp16.safetensors")
    assert weights.local(NAME, parts) is None
    with pytest.raises(EdadmError, match=r"has no diffusion_pytorch_model\.\*, and nothing more"):
        weights.fetched(NAME, parts, 0.2)
    put(snapshot, "diffusion_pytorch_model.bin")
    assert weights.local(NAME, parts) == snapshot


def test_the_setting_of_a_part_that_cannot_be_fetched_is_named(snapshot: Path) -> None:
    with pytest.raises(EdadmError, match=r"^model\.first_stage=nobody/nothing is no file or folder here"):
        dit.imagenet_dit(first_stage="nobody/nothing")
    put(snapshot, "config.json")
    with pytest.raises(EdadmError, match=r"^model\.first_stage=somebody/something: .* has no diffusion_pytorch_model"):
        dit.imagenet_dit(first_stage=NAME)


def test_a_pipeline_is_here_when_all_its_networks_are(snapshot: Path) -> None:
    index = {"unet": ["diffusers", "UNet2DModel"], "vae": ["diffusers", "VQModel"], "text_encoder": [None, None]}
    put(snapshot, "unet/diffusion_pytorch_model.safetensors")
    assert weights.local(NAME) is None
    (snapshot / weights.INDEX).write_text(json.dumps(index))
    assert weights.local(NAME) is None
    put(snapshot, "vae/diffusion_pytorch_model.fp16.safetensors", "vae/model-00001-of-00002.safetensors")
    assert weights.local(NAME) is None
    (snapshot / "vae" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
    )
    assert weights.local(NAME) is None
    put(snapshot, "vae/model-00002-of-00002.safetensors")
    assert weights.local(NAME) == snapshot


def test_a_folder_with_a_variant_or_shards_alone_says_what_to_do(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path / "fp16", variant="fp16")
    tiny_unet().save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    with pytest.raises(EdadmError, match=r"is missing.*it has diffusion_pytorch_model\.fp16\.safetensors.*variant="):
        load_model(tmp_path / "fp16")
    with pytest.raises(EdadmError, match=r"it has diffusion_pytorch_model-00001-of-.*max_shard_size"):
        load_model(tmp_path / "shards")
    with pytest.raises(EdadmError, match=r"no weights in float32.*fp16\.safetensors.*variant="):
        weights.refuse_variants(tmp_path / "fp16")
    weights.refuse_variants(tmp_path / "shards")
    save_file({"a": torch.zeros(1)}, tmp_path / "fp16" / "diffusion_pytorch_model.safetensors")
    weights.refuse_variants(tmp_path / "fp16")

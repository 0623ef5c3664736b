from __future__ import annotations

import argparse
import builtins
import sys
import types
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from edadm.errors import EdadmError
from edadm.tasks.checkpoint_file import read_file, state_dict

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "old.pt"])
def test_tensors_come_back_as_they_were_saved(name, tmp_path):
    path = tmp_path / name
    if name.endswith("safetensors"):
        save_file(WEIGHTS, path)
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=name != "old.pt")
    read = state_dict(read_file(path), str(path))
    assert read.keys() == WEIGHTS.keys()
    for key, tensor in WEIGHTS.items():
        assert torch.equal(read[key], tensor) and read[key].dtype == tensor.dtype


def test_objects_of_a_trainer_are_skipped_without_their_code(tmp_path, monkeypatch):
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    callback = type("ModelCheckpoint", (), {"__module__": name, "__qualname__": "ModelCheckpoint"})
    module.ModelCheckpoint = callback
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.setitem(sys.modules, part, module)
    state = callback()
    state.best = 3
    path = tmp_path / "model.ckpt"
    content = {"state_dict": WEIGHTS, "callbacks": {callback: state}, "args": argparse.Namespace(lr=0.1), "epoch": 3}
    torch.save(content, path)
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", name):
        monkeypatch.delitem(sys.modules, part)
    read = read_file(path)
    assert state_dict(read, str(path), section="state_dict").keys() == WEIGHTS.keys()
    assert read["epoch"] == 3 and "pytorch_lightning" not in sys.modules
    assert not isinstance(read["args"], argparse.Namespace)


class Evil:
    def __reduce__(self):
        return builtins.eval, ("__import__('pathlib').Path(TARGET).touch()",)


def test_a_file_that_asks_for_other_code_is_refused_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(builtins, "TARGET", tmp_path / "ran", raising=False)
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": WEIGHTS, "callbacks": Evil()}, path)
    with pytest.raises(EdadmError, match=r"eval, which plain weights do not need.*safetensors"):
        read_file(path)
    assert not (tmp_path / "ran").exists()


def test_an_old_file_with_objects_of_a_trainer_is_not_called_truncated(tmp_path):
    path = tmp_path / "old.pt"
    content = {"state_dict": WEIGHTS, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    with pytest.raises(EdadmError, match=r"asks for argparse\.Namespace, .*save its state dict as \.safetensors"):
        read_file(path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.ckpt", "old.pt"])
@pytest.mark.parametrize("kept", [0, 40, 0.5, 0.99])
def test_a_truncated_file_is_named(name, kept, tmp_path):
    path = tmp_path / name
    weights = {"a": torch.zeros(100, 100)}
    if name.endswith("safetensors"):
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=name != "old.pt")
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content)) if kept < 1 else kept])
    with pytest.raises(EdadmError, match=rf"cannot read .*{name}.*truncated"):
        read_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x00\x01 no checkpoint at all", "cannot read"),
    ],
)
def test_what_a_failed_download_leaves_is_named(content, message, tmp_path):
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(EdadmError, match=message):
        read_file(path)


def test_an_archive_that_holds_a_checkpoint_is_to_be_unpacked(tmp_path):
    path = tmp_path / "lsun.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.ckpt", b"content")
    with pytest.raises(EdadmError, match=r"archive of model\.ckpt: unpack it"):
        read_file(path)


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(EdadmError, match="no checkpoint at"):
        read_file(tmp_path / "none.ckpt")


@pytest.mark.parametrize(
    ("loaded", "message"),
    [([1, 2], "holds a list"), ({}, "holds nothing"), ({"a": torch.zeros(1), "epoch": 3}, "it holds epoch")],
)
def test_what_is_no_state_dict_is_an_error(loaded, message):
    with pytest.raises(EdadmError, match=message):
        state_dict(loaded, "model.ckpt")


def test_a_section_is_taken_only_where_it_is():
    assert state_dict({"ema": WEIGHTS, "opt": 1}, "model.pt", section="ema") == WEIGHTS
    assert state_dict(WEIGHTS, "model.pt", section="ema") == WEIGHTS

from __future__ import annotations

import hashlib
import pickle
import warnings

import pytest
import torch
from safetensors.torch import save_file

from edadm.errors import EdadmError
from edadm.metrics.weights import checked_sha256, fetched, read_state

STATE = {"layer.weight": torch.arange(6.0).reshape(2, 3), "layer.bias": torch.zeros(2)}


@pytest.mark.parametrize("kind", ["safetensors", "pickle", "training", "parallel"])
def test_the_usual_files_give_the_same_state(tmp_path, kind):
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pt")
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        parallel = {f"module.{key}": value for key, value in STATE.items()}
        torch.save({"pickle": STATE, "training": {"epoch": 3, "state_dict": STATE}, "parallel": parallel}[kind], path)
    state = read_state(path)
    assert state.keys() == STATE.keys() and all(torch.equal(state[key], STATE[key]) for key in STATE)


class Command:
    """A pickle that would run code when it is read."""

    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("kind", ["cut safetensors", "cut pickle", "code", "list", "program"])
def test_other_files_are_refused_by_name(tmp_path, kind, capsys):
    path = tmp_path / ("weights.safetensors" if kind == "cut safetensors" else "weights.pt")
    if kind == "cut safetensors":
        save_file(STATE, path)
        path.write_bytes(path.read_bytes()[:-4])
    elif kind == "cut pickle":
        torch.save(STATE, path)
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "code":
        path.write_bytes(pickle.dumps(Command(), protocol=2))
    elif kind == "list":
        torch.save([1, 2], path)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls its format of programs outdated
            torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(EdadmError, match=r"weights\.") as error:
        read_state(path)
    assert "code ran" not in capsys.readouterr().out
    assert ("a program that would run" in str(error.value)) == (kind == "program")


def test_a_checksum_is_checked(tmp_path):
    path = tmp_path / "weights.pt"
    with pytest.raises(EdadmError, match=r"no CLIP weights at .*weights\.pt: fetch them"):
        checked_sha256(path, None, "CLIP", "fetch them")
    path.write_bytes(b"abc")
    found = hashlib.sha256(b"abc").hexdigest()
    assert checked_sha256(path, None, "CLIP", "fetch them") == checked_sha256(path, found, "CLIP", "") == found
    with pytest.raises(EdadmError, match=f"has sha256 {found}, expected {'0' * 64}.*Remove it and fetch them"):
        checked_sha256(path, "0" * 64, "CLIP", "fetch them")


def test_a_download_happens_once_and_its_failure_says_what_to_do(tmp_path):
    calls = []

    def download(url, path):
        calls.append(url)
        path.write_bytes(b"x")

    def offline(url, path):
        raise OSError("no route to host")

    path = tmp_path / "new" / "weights.pt"
    with pytest.raises(EdadmError, match=r"the download failed \(no route to host\): fetch them"):
        fetched("https://u", path, offline, "CLIP", "fetch them")
    for _ in range(2):
        assert fetched("https://u", path, download, "CLIP", "fetch them") == path
    assert calls == ["https://u"]

from __future__ import annotations

import logging
import pickle
import urllib.error

import pytest
import torch

from edadm.errors import EdadmError
from edadm.metrics.inception_network import RELEASE_SHA256, find_weights, load_network


def test_random_weights_need_their_checksum_or_a_waiver(inception_weights, caplog):
    with pytest.raises(EdadmError, match=f"expected {RELEASE_SHA256}"):
        find_weights(inception_weights)
    with caplog.at_level(logging.WARNING):
        path, found = find_weights(inception_weights, sha256=None)
    assert path == inception_weights and "not the release" in caplog.text
    assert find_weights(inception_weights, sha256=found) == (path, found)


def test_a_missing_file_says_where_to_get_it(tmp_path):
    with pytest.raises(EdadmError, match=r"no Inception weights at .*missing\.pth: fetch https://"):
        load_network(tmp_path / "missing.pth")


class Command:
    """A pickle that would run code when it is read."""

    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize("kind", ["text", "code", "other network", "list"])
def test_files_that_are_no_inception_are_refused(tmp_path, kind, capsys):
    path = tmp_path / "weights.pth"
    if kind == "text":
        path.write_text("nothing")
    elif kind == "code":
        path.write_bytes(pickle.dumps(Command(), protocol=2))
    else:
        torch.save({"x": torch.zeros(1)} if kind == "other network" else [1, 2], path)
    with pytest.raises(EdadmError, match=r"weights\.pth"):
        load_network(path, sha256=None)
    assert "code ran" not in capsys.readouterr().out


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    return tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"


def test_without_network_or_file_the_message_names_both(hub, monkeypatch):
    def offline(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(EdadmError, match=r"download failed .*no route.*fetch https://.*give its path"):
        load_network()


def test_the_download_goes_where_torch_fidelity_looks_and_is_checked(hub, monkeypatch):
    asked = {}

    def download(url, path, hash_prefix, progress):
        asked.update(url=url, hash_prefix=hash_prefix)
        hub.write_bytes(b"not the release")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(EdadmError, match="damaged or another network"):
        find_weights(sha256=None)  # no waiver for a download
    assert asked["hash_prefix"] == RELEASE_SHA256 and asked["url"].endswith(hub.name)


def test_loading_leaves_the_global_generator_alone(inception_network, inception_weights):
    state = torch.get_rng_state()
    load_network(inception_weights, sha256=None)
    assert torch.equal(torch.get_rng_state(), state)
    assert not inception_network.extractor.training

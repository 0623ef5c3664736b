"""Weight files of feature networks: fetched, checked by their sha256, and read without running code from them."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from edadm.errors import EdadmError
from edadm.store import file_sha256
from edadm.tasks.checkpoint_file import read_file, state_dict

logger = logging.getLogger(__name__)


def checked_sha256(path: Path, expected: str | None, what: str, remedy: str) -> str:
    """Return the sha256 of a weight file.

    what: the network, for messages; remedy: what to do instead, an imperative. Raises EdadmError when the file does not
    exist or has another checksum than the expected one (None accepts any).
    """
    if not path.is_file():
        raise EdadmError(f"no {what} weights at {path}: {remedy}")
    found = file_sha256(path)
    if expected is not None and found != expected:
        raise EdadmError(
            f"{path} has sha256 {found}, expected {expected}: it is damaged or another network. Remove it and "
            f"{remedy}, or state the checksum you expect."
        )
    return found


def fetched(url: str, path: Path, download: Callable[[str, Path], None], what: str, remedy: str) -> Path:
    """Return path, downloaded from url if it is not there. Raises EdadmError when the download fails."""
    if path.is_file():
        return path
    logger.info("downloading the %s weights to %s", what, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download(url, path)
    except (OSError, RuntimeError) as error:
        raise EdadmError(f"no {what} weights at {path} and the download failed ({error}): {remedy}") from error
    return path


def read_state(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """Read a state dict without running anything the file contains (``checkpoint_file.read_file``).

    A training checkpoint yields its ``state_dict``; the prefix ``module.`` of data-parallel training is dropped. Raises
    EdadmError for a file that is cut short or broken, that would run code, or that holds anything else.
    """
    path = Path(path)
    if _is_program(path):
        raise EdadmError(
            f"{path} is a TorchScript archive, a program that would run when it is read: give the state dict of "
            "the same network, if possible as safetensors"
        )
    state = state_dict(read_file(path), str(path), "state_dict")
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def _is_program(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())

"""Read a checkpoint file without running anything it contains."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edadm.errors import EdadmError

# packages whose objects trainers save beside the weights
_TRAINER_PACKAGES = ("pytorch_lightning.", "lightning", "omegaconf.", "numpy.", "argparse.", "_codecs.", "ldm.")
_NOT_WEIGHTS = {
    b"version https://git-lfs": "a Git LFS pointer, not the weights: fetch the file itself (git lfs pull)",
    b"<": "a web page, not the weights: download the file itself",
}
_FORBIDDEN = re.compile(r"GLOBAL (\S+) was not an allowed global")  # of torch's own reader


class _Placeholder:
    """Stands for an object of the trainer, none of whose code is imported or called."""

    def __init__(self, *args: Any) -> None: ...

    def __new__(cls, *args: Any) -> _Placeholder:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None: ...


def read_file(path: str | Path) -> Any:
    """Return what a .safetensors file or a torch.save file holds, tensors on the CPU.

    Tensors of a torch.save file are mapped from the disk, so that a part of a large file costs only that part. Only
    tensors and containers are built; objects of a trainer become empty placeholders.
    Raises EdadmError for a file that is absent, truncated, of another format, or that asks for other code.
    """
    path = Path(path)
    if not path.is_file():
        raise EdadmError(f"no checkpoint at {path}: give the file of the original weights")
    require_whole(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_torch(path)


def require_whole(path: Path) -> None:
    """Raise EdadmError for a weight file that is cut short, or that a failed download left, without reading tensors.

    A .safetensors file says its length at its start, a torch.save file has its index at its end; one of torch before
    1.6 has neither and is not checked.
    """
    with open(path, "rb") as file:
        start = file.read(64)
    for marker, meaning in _NOT_WEIGHTS.items():
        if start.startswith(marker):
            raise EdadmError(f"{path} is {meaning}")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt"):
                return
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from error
    if start.startswith(b"PK") and not zipfile.is_zipfile(path):
        raise _unreadable(path, ValueError("its end is missing"))


def state_dict(loaded: Any, source: str, section: str = "") -> dict[str, Tensor]:
    """Return the tensors by name of a loaded file, of its entry ``section`` where there is one.

    source: the file, for messages. Raises EdadmError when there are no named tensors or something else among them.
    """
    if isinstance(loaded, Mapping) and isinstance(loaded.get(section), Mapping):
        loaded = loaded[section]
    if not isinstance(loaded, Mapping):
        raise EdadmError(f"{source} holds a {type(loaded).__name__}, not tensors by name: is it a model's checkpoint?")
    others = [str(key) for key, value in loaded.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if others or not loaded:
        shown = ", ".join(others[:8]) or "nothing"
        raise EdadmError(f"{source} is no state dict: beside tensors by name it holds {shown}")
    return dict(loaded)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise _unreadable(path, error) from error


def _read_torch(path: Path) -> Any:
    is_zip = zipfile.is_zipfile(path)
    placeholders: list[Any] = []
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if not any(name.endswith("data.pkl") for name in names):
            raise EdadmError(f"{path} is an archive of {', '.join(names[:4])}: unpack it and give the checkpoint in it")
    try:
        if is_zip:
            placeholders = [(_Placeholder, name) for name in _foreign_objects(path)]
        with torch.serialization.safe_globals(placeholders):
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=is_zip)
    except (RuntimeError, ValueError, KeyError, EOFError, OSError, pickle.UnpicklingError, UnicodeDecodeError) as error:
        if forbidden := _FORBIDDEN.search(str(error)):  # a file of torch before 1.6, whose names cannot be listed
            raise _foreign(path, [forbidden[1]]) from error
        raise _unreadable(path, error) from error


def _foreign_objects(path: Path) -> list[str]:
    """Names of the trainer's classes in a file; EdadmError when it asks for anything else than these and tensors."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    unknown = sorted(name for name in names if not name.startswith(_TRAINER_PACKAGES))
    if unknown:
        raise _foreign(path, unknown)
    return names


def _foreign(path: Path, names: Sequence[str]) -> EdadmError:
    return EdadmError(
        f"{path} asks for {', '.join(names[:8])}, which plain weights do not need, so it is not read. "
        "If you trust it, save its state dict as .safetensors and give that file."
    )


def _unreadable(path: Path, error: Exception) -> EdadmError:
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    size = path.stat().st_size / 1e6
    return EdadmError(
        f"cannot read {path} ({size:.1f} MB): {reason}. It is truncated or no checkpoint: compare its size with the "
        "source's and download it again."
    )

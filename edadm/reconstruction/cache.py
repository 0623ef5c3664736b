"""Where the tensors of a reconstruction lie while nothing computes with them: on the device, on the host or on disk.

What a unit is optimised on is cached for all rows at once, and so is what the paused passes hold (the open skip
connections). At the size of Stable Diffusion that is tens of GiB, of which an iteration reads one minibatch.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import cast

import torch

from edadm.errors import EdadmError

PLACES = ("device", "host", "disk")


@dataclass(frozen=True)
class Cache:
    """Where cached tensors lie; a context manager that empties its folder before and behind.

    place: "device" (of the network), "host" (main memory) or "disk" (memory-mapped files in ``folder``). The files have
    no name any more once they are mapped, so a killed process leaves none behind, and each goes with its tensor.
    Raises ValueError for another place, and for "disk" without a folder.
    """

    place: str = "device"
    folder: Path | None = None

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise ValueError(f"cache is {self.place!r}: choose one of {', '.join(PLACES)}")
        if self.place == "disk" and self.folder is None:
            raise ValueError("a cache on disk needs a folder")

    def __enter__(self) -> Cache:
        self._clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear()

    def _clear(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def is_apart_from(self, device: torch.device) -> bool:
        """Tell whether tensors of this device have to be moved to lie here."""
        return self.place == "disk" or (self.place == "host" and device.type != "cpu")

    def serves(self, device: torch.device) -> bool:
        """Tell whether a device can compute with tensors that lie here."""
        return self.place == "device" or device.type == "cpu"

    def holds(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor lies here already."""
        if self.place == "disk":
            return tensor.device.type == "cpu" and tensor.untyped_storage().filename is not None
        return self.place == "device" or tensor.device.type == "cpu"

    def stack(self, batches: Iterable[Sequence[torch.Tensor]], rows: Sequence[int]) -> list[torch.Tensor]:
        """Concatenate several tensors at once over their rows, each batch copied as it comes.

        batches: of every tensor a part, (rows of the batch, ...). rows: those of every batch, or a fixed share of them.
        The result has the strides that ``torch.cat`` gives.
        """
        whole: list[torch.Tensor] = []
        first = 0
        for parts in batches:
            total = sum(rows) * len(parts[0]) // rows[0] if parts and not whole else 0
            whole = whole or [self._empty((total, *part.shape[1:]), _cat_strides(part), part) for part in parts]
            last = first + (len(parts[0]) if parts else 0)
            for tensor, part in zip(whole, parts, strict=True):
                tensor[first:last].copy_(part)
            first = last
        return whole

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a tensor that lies here."""
        return self._empty(tuple(tensor.shape), tensor.stride(), tensor).copy_(tensor)

    def _empty(self, shape: tuple[int, ...], strides: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
        """Return a dense tensor without values in the type of another one."""
        if self.place != "disk" or 0 in shape:
            device = like.device if self.place == "device" else torch.device("cpu")
            return torch.empty_strided(shape, strides, dtype=like.dtype, device=device)
        size = like.element_size()
        for length in shape:
            size *= length
        return torch.empty(0, dtype=like.dtype).set_(self._file(size), 0, shape, strides)

    def _file(self, size: int) -> torch.UntypedStorage:
        """Return the storage of a new file. Its blocks are reserved, since a full disk would kill a write to a map."""
        assert self.folder is not None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder)
            try:
                reserve = getattr(os, "posix_fallocate", None)
                reserve(handle, 0, size) if reserve else os.truncate(handle, size)
                return cast(torch.UntypedStorage, torch.UntypedStorage.from_file(name, True, size))
            finally:
                os.close(handle)
                os.unlink(name)
        except OSError as error:
            raise EdadmError(
                f"no room for {size / 2**20:.0f} MiB of reconstruction.cache=disk in {self.folder}: "
                f"{error.strerror or error}. Free space, point EDADM_CACHE to a larger disk, or lower profile.rows"
            ) from error


def _cat_strides(part: torch.Tensor) -> tuple[int, ...]:
    """Return the strides of tensors like this one behind ``torch.cat`` over axis 0, which do not depend on the rows."""
    return torch.cat([part[:1]]).stride()

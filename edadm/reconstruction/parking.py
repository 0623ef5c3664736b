"""Move what a waiting forward pass holds to where the cache lies, and back before it goes on.

A paused pass keeps its activations in the local variables of the suspended calls. They are found there and given other
storage; the tensor objects stay, so the network's code does not notice. Parameters and buffers of the network are never
touched, nor anything that does not have one entry per row, since another pass might share it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import greenlet
from torch.utils._pytree import tree_leaves

from edadm.reconstruction.cache import Cache


@dataclass
class _Shared:
    """Tensors on one storage, and a copy of that storage where the cache lies, as bytes."""

    tensors: list[torch.Tensor]
    copy: torch.Tensor
    versions: list[int] = field(default_factory=list)

    def is_copied(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Tell whether the copy still holds the values of these tensors: known ones, not written to since."""
        known = {id(tensor): version for tensor, version in zip(self.tensors, self.versions)}
        return all(known.get(id(tensor)) == tensor._version for tensor in tensors)


class Parking:
    """Where the passes of one network wait. fixed: tensors that stay where they are, such as its parameters."""

    def __init__(self, cache: Cache, device: torch.device, fixed: Iterable[torch.Tensor]):
        self.cache, self.device = cache, device
        self._fixed = {tensor.untyped_storage().data_ptr() for tensor in fixed}
        self._parked: dict[greenlet, list[_Shared]] = {}

    def put_away(self, waiting: greenlet, rows: int) -> None:
        """Move the tensors with ``rows`` rows that a suspended pass holds."""
        storages: dict[int, list[torch.Tensor]] = {}
        for tensor in held_tensors(waiting, rows):
            pointer = tensor.untyped_storage().data_ptr()
            if pointer and pointer not in self._fixed and not self.cache.holds(tensor):
                storages.setdefault(pointer, []).append(tensor)
        before = self._parked.pop(waiting, [])
        parked = []
        for tensors in storages.values():
            known = next((shared.copy for shared in before if shared.is_copied(tensors)), None)
            copy = self.cache.keep(_all_bytes(tensors[0])) if known is None else known
            for tensor in tensors:
                _move(tensor, copy)
            parked.append(_Shared(tensors, copy))
        self._parked[waiting] = parked

    def bring_back(self, waiting: greenlet) -> None:
        """Move the tensors of a pass back to the device of the network, unless it can compute with them as they are."""
        for shared in self._parked.get(waiting, []):
            if not self.cache.serves(self.device):
                copy = shared.copy.to(self.device, copy=True)
                for tensor in shared.tensors:
                    _move(tensor, copy)
            shared.versions = [tensor._version for tensor in shared.tensors]


def held_tensors(waiting: greenlet, rows: int) -> list[torch.Tensor]:
    """Return the tensors with ``rows`` rows in the local variables of a suspended greenlet, each once."""
    found: dict[int, torch.Tensor] = {}
    frame: Any = waiting.gr_frame
    while frame is not None:
        for value in tree_leaves(list(frame.f_locals.values())):
            if isinstance(value, torch.Tensor) and value.ndim and len(value) == rows:
                found[id(value)] = value
        frame = frame.f_back
    return list(found.values())


def _all_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _move(tensor: torch.Tensor, storage: torch.Tensor) -> None:
    """Let a tensor look at the same place of another storage."""
    view = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    place = (storage.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
    tensor.data = view.set_(*place)

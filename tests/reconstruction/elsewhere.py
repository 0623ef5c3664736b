"""A cache apart from a network on the CPU, as host memory is from a GPU."""

from __future__ import annotations

from edadm.reconstruction.cache import Cache


class Elsewhere(Cache):
    """Host memory of a network on another device, which cannot compute with it; counts what is copied here."""

    def __init__(self):
        super().__init__("host")
        object.__setattr__(self, "copies", [])

    def is_apart_from(self, device):
        return True

    def serves(self, device):
        return False

    def holds(self, tensor):
        return any(tensor.untyped_storage().data_ptr() == copy.data_ptr() for copy in self.copies)

    def keep(self, tensor):
        self.copies.append(super().keep(tensor))
        return self.copies[-1]

"""Denoiser families: what a network of a known architecture is made of.

A family is a module with ``matches(model)``, ``layer_role(name)``, ``units(model)`` and ``splits(model)``.
"""

from __future__ import annotations

from types import ModuleType

from torch import nn

from edadm.errors import EdadmError
from edadm.quant.families import unet2d

FAMILIES: dict[str, ModuleType] = {"unet2d": unet2d}


def family_of(model: nn.Module) -> ModuleType:
    """Return the family of a denoiser. Raises EdadmError naming the class when none fits."""
    for family in FAMILIES.values():
        if family.matches(model):
            return family
    raise EdadmError(
        f"no family for a denoiser of class {type(model).__name__}: known are {', '.join(FAMILIES)}; "
        "add a file to edadm/quant/families and its line in FAMILIES"
    )

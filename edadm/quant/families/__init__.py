"""Denoiser families: what a network of a known architecture is made of, one file each."""

from __future__ import annotations

from torch import nn

from edadm.errors import EdadmError
from edadm.quant.families import dit, flux, pixart, sd3, unet2d, unet2d_condition
from edadm.quant.families.family import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (unet2d, unet2d_condition, dit, pixart, sd3, flux)
}


def family_of(model: nn.Module) -> Family:
    """Return the family of a denoiser. Raises EdadmError naming the class when none fits."""
    for family in FAMILIES.values():
        if family.matches(model):
            return family
    known = ", ".join(family.model for family in FAMILIES.values())
    raise EdadmError(
        f"no family for a denoiser of class {type(model).__name__}: known are {known}; "
        "add a file to edadm/quant/families and its line in FAMILIES"
    )

"""Checks of the installed libraries that would otherwise fail far from their cause."""

from __future__ import annotations

import importlib
import shlex
import sys
from importlib.metadata import version

from edadm.errors import EdadmError

MISMATCH = ("operator torchvision::nms does not exist", "compiled with different CUDA major versions")


def check_torchvision() -> None:
    """Import torchvision, which torch-fidelity, open_clip and the CIFAR-10 reader need.

    Raises EdadmError with both versions and the command that mends it when torchvision was built for another torch, as
    beside a CPU-only torch from an index of its own. Any other failure of the import passes through.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if not any(sign in str(error) for sign in MISMATCH):
            raise
        raise EdadmError(
            f"torch {version('torch')} and torchvision {version('torchvision')} are of different builds ({error}). "
            f"Install both from the same index: {shlex.quote(sys.executable)} -m pip install --force-reinstall "
            "torch torchvision"
        ) from error

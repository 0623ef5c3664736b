"""Post-training quantization of diffusion models.

`quantize` a diffusers pipeline, `load_pipeline` a saved one, `register` the loader with diffusers; all else is in the
modules. Nothing is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edadm.errors import EdadmError
    from edadm.pipelines import load_pipeline, quantize, register

__all__ = ["EdadmError", "load_pipeline", "quantize", "register"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("edadm.errors" if name == "EdadmError" else "edadm.pipelines"), name)

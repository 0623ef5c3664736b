"""The checkout that holds ``conf/``, ``experiments/`` and ``results/``; the wheel has none of them."""

from __future__ import annotations

import os
from pathlib import Path


def root() -> Path:
    """Return the folder of the checkout: ``EDADM_ROOT``, else the one above the package."""
    return Path(os.environ.get("EDADM_ROOT") or Path(__file__).resolve().parent.parent)

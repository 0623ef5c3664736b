"""The exceptions of edadm."""

from __future__ import annotations


class EdadmError(Exception):
    """Bad input or an impossible request. The message names the thing, the reason and the remedy."""


class Diverged(EdadmError):
    """NaN or Inf appeared in weights, a loss or a sample; the run ends with status ``diverged``."""

"""The metrics by name: what tables say of each, and the version of its values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class MetricInfo:
    """A metric as tables show it.

    kind: "reference" (distance to reference data), "set" (of the images alone) or "paired" (to the full-precision
    images of the same noise). proxy: measured in the embedded features, never to be named FID, sFID or IS. version:
    raised when values change. title and unit are what a table's head prints.
    """

    title: str
    higher_is_better: bool
    kind: Literal["reference", "set", "paired"]
    proxy: bool = False
    version: int = 1
    unit: str = ""


METRICS: dict[str, MetricInfo] = {
    "fid": MetricInfo("FID", False, "reference"),
    "fid_infinity": MetricInfo("FID, n to infinity", False, "reference"),
    "sfid": MetricInfo("sFID", False, "reference"),
    "is": MetricInfo("IS", True, "set"),
    "kid": MetricInfo("KID", False, "reference"),
    "precision": MetricInfo("precision", True, "reference"),
    "recall": MetricInfo("recall", True, "reference"),
    "fd_tiny": MetricInfo("FD-tiny", False, "reference", proxy=True),
    "fd_tiny_infinity": MetricInfo("FD-tiny, n to infinity", False, "reference", proxy=True, version=2),
    "sfd_tiny": MetricInfo("sFD-tiny", False, "reference", proxy=True),
    "is_tiny": MetricInfo("IS-tiny", True, "set", proxy=True),
    "fd_tiny_to_fp": MetricInfo("FD-tiny to FP", False, "paired", proxy=True),
    "sqnr": MetricInfo("SQNR of the noise prediction", True, "paired", unit="dB"),
    "psnr": MetricInfo("PSNR to FP", True, "paired", unit="dB"),
    "ssim": MetricInfo("SSIM to FP", True, "paired"),
    "clip": MetricInfo("CLIP score", True, "set"),
    "clip_tiny": MetricInfo("CLIP-tiny", True, "set", proxy=True),
    "aesthetic": MetricInfo("aesthetic score", True, "set"),
    "fd_dinov2": MetricInfo("FD-DINOv2", False, "reference"),
}
INCEPTION = ("fid", "fid_infinity", "sfid", "is", "kid", "precision", "recall")  # measured in Inception's features
PROMPTED = ("clip", "clip_tiny")  # of an image and its prompt
TINY = ("fd_tiny", "fd_tiny_infinity", "sfd_tiny", "is_tiny", "fd_tiny_to_fp")  # in the embedded features

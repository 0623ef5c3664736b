"""The embedded task: a small denoiser of CIFAR-10 and small feature statistics, both in the wheel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from edadm.tasks.base import Task, bands, load_unet2d

ASSETS = Path(__file__).resolve().parent.parent / "assets"


def cifar10_tiny(path: str | None = None, expected: Mapping[str, Sequence[float]] | None = None) -> Task:
    """Return the task.

    path: a diffusers folder with other weights of a ``UNet2DModel``, default the embedded ones. expected: metric ->
    [value, deviation] of full precision with the embedded weights at profile=reference.
    """
    return Task(
        name="cifar10_tiny",
        weights=Path(path).expanduser() if path else ASSETS / "cifar10_tiny",
        sample_shape=(3, 32, 32),
        load=load_unet2d,
        expected_band=bands(None if path else expected),
    )

"""Conditions of images (class labels, prompts) and classifier-free guidance (Ho and Salimans 2021)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from edadm.errors import EdadmError
from edadm.sampling.interface import Denoise, unwrap
from edadm.sampling.noise import numpy_rng

Condition = Mapping[str, Tensor]
"""Arguments of the network by name, with one row per image, such as ``class_labels`` or ``encoder_hidden_states``."""


class Conditions(Protocol):
    """What the images of a stream are of."""

    @property
    def null(self) -> Condition | None:
        """One row that stands for no condition; None for a network that was not trained with one."""

    def rows(self, stream: str, seed: int, numbers: Sequence[int]) -> Condition:
        """Return the conditions of these image numbers, on the CPU; any number >= 0 has one.

        A row depends on (stream, seed, its number) only, as the noise does.
        """

    def identity(self, stream: str) -> dict[str, Any]:
        """Return what tells the conditions of a stream from others, as JSON-like data for the keys of stages."""


@dataclass(frozen=True)
class Guidance:
    """Which network calls make the noise of a conditional network.

    scale: s in eps(null) + s (eps(condition) - eps(null)); 1 calls the network with the condition alone.
    channels: leading output channels that are guided, the others stay those of the condition; None is all of them. DiT
    guides three of its four latent channels, and never its variance (golden README, ldm, 6).
    """

    conditions: Conditions
    scale: float = 1.0
    channels: int | None = None

    def __post_init__(self) -> None:
        if self.guides and self.conditions.null is None:
            raise EdadmError(
                f"guidance scale {self.scale:g} on a model without a null condition: choose scale 1, or a model that "
                "was trained with its condition dropped at times"
            )

    @property
    def guides(self) -> bool:
        """Say whether there are two rows per image."""
        return self.scale != 1

    @property
    def null(self) -> Condition | None:
        """The null condition where it is used, one row."""
        return self.conditions.null if self.guides else None

    def identity(self, stream: str) -> dict[str, Any]:
        """Return what guidance contributes to the key of what is sampled with conditions of a stream."""
        return {"conditions": self.conditions.identity(stream), "scale": self.scale, "channels": self.channels}


def denoise_for(
    network: Callable[..., Any],
    guidance: Guidance | None,
    stream: str,
    seed: int,
    numbers: Sequence[int],
    device: torch.device | str = "cpu",
) -> Denoise:
    """Bind the conditions of these images to a network; without guidance this is the network itself.

    network: called with x, times and the condition by name. The function returned takes x (len(numbers), C, H, W) and
    times, makes one call with twice as many rows (null conditions first) where it guides, and returns what one row per
    image would, in the type of x.
    """
    if guidance is None:
        return network
    condition = on_device(guidance.conditions.rows(stream, seed, numbers), device)
    null = guidance.null
    if null is None:
        return lambda x, t: unwrap(network(x, t, **condition)).to(x.dtype)
    both = doubled(condition, on_device(null, device))

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        output = unwrap(network(torch.cat([x, x]), torch.cat([t, t]), **both)).to(x.dtype)
        return combined(output, guidance.scale, guidance.channels)

    return denoise


def on_device(condition: Condition, device: torch.device | str) -> dict[str, Tensor]:
    """Return a condition on a device."""
    return {name: tensor.to(device) for name, tensor in condition.items()}


def doubled(condition: Condition, null: Condition) -> dict[str, Tensor]:
    """Return twice as many rows: the null row once per row of the condition, then the condition."""
    require_same_rows(condition, null)
    return {name: torch.cat([null[name].expand_as(rows), rows]) for name, rows in condition.items()}


def require_same_rows(condition: Condition, null: Condition) -> None:
    """Raise EdadmError when the two have different names or shapes of a row, or the null condition several rows."""
    given, none = ({name: tuple(t.shape[1:]) for name, t in part.items()} for part in (condition, null))
    if given != none:
        raise EdadmError(f"the condition has rows of {given}, the null condition of {none}: they must agree")
    if wrong := [name for name, tensor in null.items() if len(tensor) != 1]:
        raise EdadmError(f"the null condition has {len(null[wrong[0]])} rows of {wrong[0]}: it must have one")


def combined(output: Tensor, scale: float, channels: int | None = None) -> Tensor:
    """Return the guided output (B, C, H, W) of (2B, C, H, W), whose first half had the null condition."""
    without, given = output.chunk(2)
    guided = without[:, :channels] + scale * (given[:, :channels] - without[:, :channels])
    return guided if channels is None else torch.cat([guided, given[:, channels:]], dim=1)


@dataclass(frozen=True, eq=False)
class ClassConditions:
    """Class labels: every ``classes`` consecutive images hold each class once, in an order of their own.

    classes: number of classes. null_label: the label that stands for none (usually ``classes``), or None.
    embedding: float (labels, width), when the network takes the label as one context token, ``encoder_hidden_states``
    (LDM on ImageNet), instead of as ``class_labels`` (DiT).
    """

    classes: int
    null_label: int | None = None
    embedding: Tensor | None = None

    def __post_init__(self) -> None:
        most = max(self.classes - 1, self.null_label or 0)
        if self.embedding is not None and len(self.embedding) <= most:
            raise EdadmError(f"the class embedding has {len(self.embedding)} rows, label {most} is out of its range")

    @property
    def null(self) -> Condition | None:
        """The condition of the null label."""
        return None if self.null_label is None else self.of(torch.tensor([self.null_label]))

    def rows(self, stream: str, seed: int, numbers: Sequence[int]) -> Condition:
        """Return the conditions of these image numbers."""
        return self.of(self.labels(stream, seed, numbers))

    def labels(self, stream: str, seed: int, numbers: Sequence[int]) -> Tensor:
        """Return the labels int64 (len(numbers),) of these image numbers; they depend on (stream, seed, number)."""
        order = {block: self._order(stream, seed, block) for block in {n // self.classes for n in numbers}}
        return torch.tensor([order[n // self.classes][n % self.classes] for n in numbers], dtype=torch.int64)

    def _order(self, stream: str, seed: int, block: int) -> list[int]:
        return numpy_rng(f"{stream}/labels", seed, block).permutation(self.classes).tolist()

    def of(self, labels: Tensor) -> Condition:
        """Return the condition of labels int64 (B,)."""
        if self.embedding is None:
            return {"class_labels": labels}
        return {"encoder_hidden_states": self.embedding[labels][:, None]}

    def identity(self, stream: str) -> dict[str, Any]:
        """Return the class and its numbers, the same for every stream; the embedding belongs to the checkpoint."""
        return {
            "part": type(self).__name__,
            "version": 1,
            "classes": self.classes,
            "null_label": self.null_label,
            "embedded": self.embedding is not None,
        }

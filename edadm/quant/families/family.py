"""What quantization and reconstruction know of a denoiser's architecture."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Roles = tuple[tuple[str, str], ...]


def no_splits(model: Any) -> dict[str, int]:
    """Return the splits of a network without concatenated skip connections: none."""
    return {}


def itself(name: str) -> str:
    """Return the original of a layer where every layer is its own."""
    return name


@dataclass(frozen=True)
class Family:
    """What a denoiser of a known architecture is made of. A pattern is a regular expression for a whole module name.

    name: of its file in ``edadm/quant/families``. model: the name of its class in diffusers.
    roles: (pattern, role) of every layer and attention product, in the order in which a block runs them.
    units: the names of the modules that are reconstructed as a whole, in execution order.
    splits: for each shortcut behind a concatenation, the number of channels of the first part.
    main_path_end: roles of layers; the first that a block has ends its main path (of image tokens, beside a context).
    last_registered: roles of the layers that the original code registers last in a block, if diffusers does not.
    float_layers: pattern of layers that stay in floating point by definition.
    tokens: pattern of layers and blocks whose tensors are (rows, tokens, channels) in the original code too.
    runs_again: pattern of layers that run once more, with the same input, after the block they belong to.
    shared_arguments: names of the arguments of a block that hold one value for all rows.
    original_of: from the name of a module to that of the one which the original network has in its place.
    tables: names of buffers that the original network counts among its parameters.
    """

    name: str
    model: str
    roles: Roles
    units: Callable[[Any], Iterator[str]]
    splits: Callable[[Any], dict[str, int]] = no_splits
    main_path_end: tuple[str, ...] = ("feed_forward_out",)
    last_registered: tuple[str, ...] = ()
    float_layers: str | None = None
    tokens: str | None = None
    runs_again: str | None = None
    shared_arguments: tuple[str, ...] = ()
    original_of: Callable[[str], str] = itself
    tables: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """The file that defines the family, from the root of the repository."""
        return f"edadm/quant/families/{self.name}.py"

    def matches(self, model: nn.Module) -> bool:
        """Tell whether a denoiser belongs to this family."""
        return type(model).__name__ == self.model

    def layer_role(self, name: str) -> str | None:
        """Return the role of a layer or attention product by its name, None if the family does not know it."""
        return next((role for pattern, role in self.roles if re.fullmatch(pattern, name)), None)

    def position(self, name: str) -> int:
        """Return the place of a layer or attention product among those that a block runs."""
        return next(i for i, (pattern, _) in enumerate(self.roles) if re.fullmatch(pattern, name))

    def is_float(self, name: str) -> bool:
        """Tell whether a layer stays in floating point by definition."""
        return _matches(self.float_layers, name)

    def has_tokens(self, name: str) -> bool:
        """Tell whether the tensors of a layer or block are (rows, tokens, channels) in the original code too."""
        return _matches(self.tokens, name)

    def layer_runs_again(self, name: str) -> bool:
        """Tell whether a layer runs once more, with the same input, after the block it belongs to."""
        return _matches(self.runs_again, name)

    def copies(self, model: nn.Module) -> frozenset[str]:
        """Return the layers that equal to the bit another one, which the original network has in their place.

        On the meta device, where tensors have no values, all layers with an original are copies.
        """
        modules = dict(model.named_modules())
        originals = {name: modules[self.original_of(name)] for name in modules if self.original_of(name) != name}
        return frozenset(name for name, original in originals.items() if _equal(modules[name], original))

    def parameters(self, model: nn.Module) -> int:
        """Return the number of parameters that the original network has for a model: copies count once."""
        copies = self.copies(model)
        counted = (p.numel() for name, p in model.named_parameters() if name.rpartition(".")[0] not in copies)
        return sum(counted) + sum(model.get_buffer(table).numel() for table in self.tables)


def _equal(layer: nn.Module, other: nn.Module) -> bool:
    tensors = list(zip(layer.parameters(recurse=False), other.parameters(recurse=False), strict=True))
    return bool(tensors) and all(one.is_meta or torch.equal(one, another) for one, another in tensors)


def _matches(pattern: str | None, name: str) -> bool:
    return pattern is not None and re.fullmatch(pattern, name) is not None

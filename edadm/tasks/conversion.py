"""Fill a diffusers module from a checkpoint with other names: every tensor accounted for, or an error that names it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from edadm.errors import EdadmError

_SHOWN = 8


@dataclass(frozen=True)
class Source:
    """Where a tensor of the diffusers module comes from: an original key, and what to take of that tensor."""

    key: str
    take: Callable[[Tensor], Tensor] = lambda tensor: tensor


def convert(
    state: Mapping[str, Tensor], source_of: Callable[[str], Source], module: nn.Module, file: str
) -> dict[str, Tensor]:
    """Return the tensors of ``module`` under its own names, views of those in ``state``.

    source_of: from a name of the module to its origin. Works on meta tensors. file: for messages.
    Raises EdadmError naming missing, unexpected and mis-shaped original keys.
    """
    expected = module.state_dict()
    sources = {name: source_of(name) for name in expected}
    used = {source.key for source in sources.values()}
    problems = [f"missing {source.key}" for source in sources.values() if source.key not in state]
    problems += [f"unexpected {key}" for key in state if key not in used]
    converted = {name: _taken(source, state[source.key]) for name, source in sources.items() if source.key in state}
    for name, tensor in converted.items():
        if tensor is None or tensor.shape != expected[name].shape:
            found, wanted = tuple(state[sources[name].key].shape), tuple(expected[name].shape)
            problems.append(f"{sources[name].key} of shape {found} does not give {name} of shape {wanted}")
    refuse(problems, f"{file} does not fit {type(module).__name__}")
    return {name: tensor for name, tensor in converted.items() if tensor is not None}


def _taken(source: Source, tensor: Tensor) -> Tensor | None:
    try:
        return source.take(tensor)
    except RuntimeError:  # a shape that cannot be divided as asked
        return None


def fill(module: nn.Module, tensors: Mapping[str, Tensor], file: str) -> nn.Module:
    """Give a module without storage float32 copies of converted tensors and return it in evaluation mode.

    Raises EdadmError naming tensors with NaN or Inf, and those that are no floating-point numbers.
    """
    problems = []
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            problems.append(f"{name} is {tensor.dtype}")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{name} has NaN or Inf")
    refuse(problems, f"{file} has bad values for {type(module).__name__}")
    copies = {name: _copy(tensor) for name, tensor in tensors.items()}
    module.load_state_dict(copies, strict=True, assign=True)
    without_storage = [name for name, tensor in module.named_buffers() if tensor.is_meta]
    assert not without_storage, without_storage
    return module.eval()


def _copy(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def refuse(problems: list[str], what: str) -> None:
    """Raise EdadmError with the first problems, if there are any."""
    distinct = list(dict.fromkeys(problems))
    if distinct:
        more = f"; and {len(distinct) - _SHOWN} more" if len(distinct) > _SHOWN else ""
        raise EdadmError(f"{what}: {'; '.join(distinct[:_SHOWN])}{more}")


def original_arguments(
    params: Mapping[str, Any], target: type, without_effect: set[str], fixed: Mapping[str, Any], what: str
) -> dict[str, Any]:
    """Return the arguments of an original constructor that are fields of the dataclass ``target``, lists as tuples.

    fixed: arguments that can be converted at one value only.
    Raises EdadmError naming arguments and values that cannot be converted, and fields without default that are absent.
    """
    known = {field.name for field in fields(target)}
    relevant = {name: value for name, value in params.items() if name not in without_effect}
    problems = [f"{name}={value!r}" for name, value in relevant.items() if name in fixed and value != fixed[name]]
    problems += [f"{name}={value!r}" for name, value in relevant.items() if name not in known and name not in fixed]
    problems += [
        f"no {field.name}" for field in fields(target) if field.default is MISSING and field.name not in params
    ]
    refuse(problems, f"{what} with these parameters cannot be converted")
    return {name: tuple(v) if isinstance(v, list | tuple) else v for name, v in relevant.items() if name in known}

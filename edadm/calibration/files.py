"""Named tensors in one safetensors file, with errors a user can act on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from edadm.errors import EdadmError
from edadm.store import atomic_file


def named(prefix: str, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return tensors under the names ``prefix.name`` in a file; none for None."""
    return {f"{prefix}.{name}": tensor for name, tensor in (tensors or {}).items()}


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return the tensors of a file that `named` put there, by their own names; None without any."""
    start = f"{prefix}."
    found = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    return found or None


def write_tensors(path: Path, tensors: Mapping[str, Tensor | None], metadata: Mapping[str, object]) -> Path:
    """Write the tensors that are not None and the metadata (as text) to path, whole or not at all."""
    from safetensors.torch import save_file

    present = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}
    with atomic_file(Path(path)) as temporary:
        save_file(present, temporary, metadata={name: str(value) for name, value in metadata.items()})
    return Path(path)


def read_tensors(
    path: Path, what: str, required: tuple[str, ...], optional: tuple[str, ...] = (), prefixes: tuple[str, ...] = ()
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return (tensors, metadata) of a file of ours.

    what: name of the content in messages. prefixes: of tensors that `named` wrote, any number. Raises EdadmError when
    there is no file, when it is broken, or when tensors are missing or unknown.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise EdadmError(f"no {what} at {path}: give the path of a .safetensors file that a run has saved")
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise EdadmError(f"the {what} {path} is broken ({error}): copy it again or make it again") from error
    missing = [name for name in required if name not in tensors]
    unknown = sorted(set(tensors) - set(required) - set(optional))
    unknown = [name for name in unknown if not name.startswith(tuple(f"{prefix}." for prefix in prefixes))]
    if missing or unknown:
        faults = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has unknown {', '.join(unknown)}"] * bool(unknown)
        raise EdadmError(f"{path} is no {what}: it {' and '.join(faults)}; expected {', '.join(required + optional)}")
    return tensors, metadata

"""Where the weights of a task are: a file, a folder, or a name on the Hugging Face hub.

A name on the hub is only ever what the user has written himself. It is downloaded when a run is prepared, and the log
says before what, how much and where to.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from edadm.errors import EdadmError
from edadm.tasks import base

NETWORKS = ("unet", "transformer", "vae", "vqvae", "text_encoder", "text_encoder_2", "text_encoder_3")
WEIGHTS = (".safetensors", ".bin")
logger = logging.getLogger(__name__)

INDEX = "model_index.json"  # of the folder of a pipeline
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_name(path: str) -> bool:
    """Say whether a path that is no file or folder here reads as ``owner/name``, and not as a file of weights."""
    reads_as_name = bool(_HUB_NAME.fullmatch(path)) and Path(path).suffix not in base.WEIGHTS
    return reads_as_name and not Path(path).expanduser().exists()


def local(path: str | None, parts: Sequence[str] = ()) -> Path | None:
    """Return the place of ``model.path`` on this machine, without any download; None where there is none.

    parts: what of a hub repository is needed, as patterns of its files; without any, all networks of a pipeline. One of
    which a part is missing, as an interrupted download leaves it, is not here.
    """
    if path is None:
        return None
    if not is_hub_name(path):
        return Path(path).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(path, allow_patterns=list(parts) or None, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError):
        return None
    try:
        return whole(path, found, parts)
    except EdadmError:
        return None


def _plain(files: Iterable[Path]) -> list[Path]:
    """Return those of some files that are there, without variants (``model.fp16.safetensors``) and indexes."""
    return [file for file in files if file.is_file() and file.name.count(".") == 1]


def _absent_networks(folder: Path) -> list[str]:
    """Return what a pipeline's folder lacks: its index, or weights of networks that are read."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [INDEX]
    networks = [name for name, value in index.items() if name in NETWORKS and isinstance(value, list) and value[-1]]
    return [f"weights of {name}" for name in networks if not (_has_weights(folder / name) or _has_weights(folder))]


def _has_weights(folder: Path) -> bool:
    """Say whether a folder has weights that are read without naming a variant, in one file or in all their shards."""
    for index in folder.glob("*.index.json"):
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        if all((folder / shard).is_file() for shard in shards):
            return True
    return any("-of-" not in file.name for file in _plain(_weights(folder)))


def _weights(folder: Path) -> list[Path]:
    return sorted(path for suffix in WEIGHTS for path in folder.glob(f"*{suffix}"))


def other_weights(folder: Path) -> str:
    """Return what a folder has in place of one plain file of weights and what to do, as the end of a message."""
    files = _weights(folder)
    if not files:
        return ""
    shown = ", ".join(file.name for file in files[:4])
    return (
        f"; it has {shown}: load that with diffusers (variant= for one such as fp16) and save it whole, "
        'save_pretrained(folder, max_shard_size="100GB")'
    )


def refuse_variants(folder: Path) -> None:
    """Raise EdadmError for a folder whose only weights are a variant, which diffusers does not find by itself."""
    if not _has_weights(folder) and (found := other_weights(folder)):
        raise EdadmError(f"{folder} has no weights in float32 that are whole{found}")


def fetched(path: str | None, parts: Sequence[str], gigabytes: float, setting: str = "model.path") -> Path | None:
    """Return the place of a path on this machine, downloaded if it is a hub name that is not here yet.

    gigabytes: about what a download fetches. setting: the one that holds the path. Raises EdadmError naming it when a
    download is not possible, with the ways around it.
    """
    found = local(path, parts)
    if path is None or found is not None:
        return found
    from huggingface_hub import constants, snapshot_download

    where = constants.HF_HUB_CACHE
    logger.info("%s=%s: downloading about %.1f GB from the hub to %s", setting, path, gigabytes, where)
    try:
        folder = Path(snapshot_download(path, allow_patterns=list(parts) or None))
    except Exception as error:  # the client raises those of its transport, whose types depend on its version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EdadmError(
            f"{setting}={path} is no file or folder here, and it could not be fetched from the hub ({reason}). Give "
            f"the path of a local copy, or fetch it where there is a network: hf download {path}"
        ) from error
    return whole(path, folder, parts, setting)


def whole(path: str, folder: Path, parts: Sequence[str] = (), setting: str = "model.path") -> Path:
    """Return the folder of a download, which without network is the part of it that an earlier one left.

    Raises EdadmError naming the setting and what the folder lacks.
    """
    absent = [part for part in parts if not _plain(folder.glob(part))] if parts else _absent_networks(folder)
    if absent:
        raise EdadmError(
            f"{setting}={path}: {folder} has no {', '.join(absent)}, and nothing more could be fetched from the hub; "
            f"fetch it where there is a network (hf download {path}), or give a repository that has it"
        )
    return folder

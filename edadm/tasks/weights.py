"""Where the weights of a task are: a file, a folder, or a name on the Hugging Face hub.

A name on the hub is only ever what the user has written himself. It is downloaded when a run is prepared, and the log
says before what, how much and where to.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from edadm.errors import EdadmError

logger = logging.getLogger(__name__)

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def is_hub_name(path: str) -> bool:
    """Say whether a path that is no file or folder here reads as ``owner/name``."""
    return bool(_HUB_NAME.fullmatch(path)) and not Path(path).expanduser().exists()


def local(path: str | None, parts: Sequence[str] = ()) -> Path | None:
    """Return the place of ``model.path`` on this machine, without any download; None where there is none.

    parts: what of a hub repository is needed, as patterns of its files.
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
    return found if any(found.rglob("*.safetensors")) or any(found.rglob("*.bin")) else None


def fetched(path: str | None, parts: Sequence[str], gigabytes: float) -> Path | None:
    """Return the place of ``model.path`` on this machine, downloaded if it is a hub name that is not here yet.

    gigabytes: about what a download fetches. Raises EdadmError when it is not possible, with the ways around it.
    """
    found = local(path, parts)
    if path is None or found is not None:
        return found
    from huggingface_hub import constants, snapshot_download

    logger.info("model.path=%s: downloading about %.1f GB from the hub to %s", path, gigabytes, constants.HF_HUB_CACHE)
    try:
        return Path(snapshot_download(path, allow_patterns=list(parts) or None))
    except Exception as error:  # the client raises those of its transport, whose types depend on its version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EdadmError(
            f"model.path={path} is no file or folder here, and it could not be fetched from the hub ({reason}). Give "
            f"the path of a local copy, or fetch it where there is a network: hf download {path}"
        ) from error

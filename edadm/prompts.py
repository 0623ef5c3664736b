"""Prompts of text-to-image tasks: a list by image number, kept in text files with one prompt a line."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from edadm.errors import EdadmError


def read_prompts(path: str | os.PathLike) -> list[str]:
    """Read a UTF-8 text file with one prompt a line; line i, counted from 0, belongs to image number i.

    Raises EdadmError when the file cannot be read, is not UTF-8, or holds no prompts or an empty line among them.
    """
    path = Path(path).expanduser()
    text = _text(path)
    prompts = [line.removesuffix("\r") for line in text.rstrip("\r\n").split("\n")]
    if not text.strip():
        raise EdadmError(f"{path} holds no prompts: write one a line")
    empty = next((number for number, prompt in enumerate(prompts, 1) if not prompt.strip()), None)
    if empty is not None:
        raise EdadmError(f"line {empty} of {path} is empty, but prompts count by line: remove it or fill it in")
    return prompts


def read_captions(path: str | os.PathLike) -> list[str]:
    """Read the prompts of a file: captions of MS-COCO (``captions_val2014.json``), each once, or lines of a text file.

    Raises EdadmError as `read_prompts` does, and for a json file that is no caption file of MS-COCO.
    """
    path = Path(path).expanduser()
    if path.suffix != ".json":
        return read_prompts(path)
    try:
        captions = [str(entry["caption"]).strip() for entry in json.loads(_text(path))["annotations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise EdadmError(
            f"{path} is no caption file of MS-COCO, which holds annotations with a caption each: give "
            "captions_val2014.json, or a text file with one prompt a line"
        ) from error
    found = list(dict.fromkeys(caption for caption in captions if caption))
    if not found:
        raise EdadmError(f"{path} holds no captions: give captions_val2014.json of MS-COCO")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise EdadmError(
            f"cannot read prompts from {path}: {error.strerror or error}. Give a text file with one prompt a line."
        ) from error
    except UnicodeDecodeError as error:
        raise EdadmError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}): save it as UTF-8 text, "
            "one prompt a line"
        ) from error


def check_prompts(prompts: Sequence[str], n: int, source: str = "prompts") -> None:
    """Raise EdadmError unless there is one prompt for each of n images. source: names the prompts in the message."""
    if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
        raise EdadmError(f"{source}: expected a list of texts, one for each image")
    if not prompts and n > 0:
        raise EdadmError(f"{source}: the list is empty, expected one prompt for each of {n} images")
    if len(prompts) != n:
        raise EdadmError(f"{source}: {len(prompts)} prompts for {n} images: image number i needs prompt number i")


@runtime_checkable
class Prompted(Protocol):
    """Conditions that are made from texts: text-to-image tasks' ``Conditions`` have this method as well."""

    def prompts(self, stream: str, seed: int, numbers: Sequence[int]) -> list[str]:
        """Return the prompts of these image numbers, each a function of (stream, seed, its number) as its condition."""

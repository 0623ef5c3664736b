"""The captions of the training images: the committed prompts of their class."""

from __future__ import annotations

import re
from pathlib import Path

from edadm.prompts import read_prompts
from edadm.tasks.cifar10 import CLASSES
from edadm.tasks.cifar10_latent import PROMPTS


def captions(folder: Path = PROMPTS) -> list[list[str]]:
    """Return the captions of each class, those that evaluate first; every class has as many."""
    files = [read_prompts(folder / name) for name in ("evaluation.txt", "calibration.txt")]
    return [[line for lines in files for line in lines[label :: len(CLASSES)]] for label in range(len(CLASSES))]


def words(texts: list[list[str]]) -> list[str]:
    """Return the words of all captions, each as often as it occurs."""
    return re.findall(r"[a-z]+", " ".join(text.lower() for of_class in texts for text in of_class))

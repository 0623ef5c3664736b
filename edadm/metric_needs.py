"""What the metrics of a run need, and what of it is here; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from edadm.errors import EdadmError
from edadm.keys import Run
from edadm.metrics import aesthetic, clip_tiny, dinov2, networks
from edadm.metrics.images import image_files
from edadm.metrics.registry import PROMPTED

HERE, MISSING, FETCHED = "here", "MISSING", "fetched on first use"
ADM = "of ADM's evaluations (openai/guided-diffusion on GitHub)"
# The real images, by dataset. Not in conf/dataset: records hold that, and reports tell runs apart by its words.
SOURCES = {
    "imagenet": f"VIRTUAL_imagenet256_labeled.npz {ADM}",
    "lsun_bedroom": f"VIRTUAL_lsun_bedroom256.npz {ADM}",
    "lsun_church": "the images of church_outdoor of LSUN (fyu/lsun on GitHub)",
    "coco": "the images of val2014 of MS-COCO (cocodataset.org)",
}


@dataclass(frozen=True)
class Need:
    """One thing that a task needs: its state, what was found, and what to do where it is missing."""

    what: str
    state: str
    found: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """The need as one line of text."""
        return f"  {self.what:<12} {self.state}: {self.found}" + (f"; {self.remedy}" if self.remedy else "")


def needs_of_metrics(run: Run, has_prompts: bool) -> Iterator[Need]:
    """Return what the metrics of a run need. has_prompts: whether its images are made of prompts.

    Raises EdadmError for a metric that does not exist, or whose settings the group ``metrics`` does not have.
    """
    if run.needs_tiny:
        yield _file("statistics", run.tiny_reference, "set metrics.reference to a file of them; null: the embedded one")
    if run.needs_inception:
        yield _reference(run, "inception", ", or to an .npz of their statistics" + _source(run))
        yield _inception_weights(run)
    if "fd_dinov2" in run.metrics:
        yield _reference(run, "dinov2")  # statistics of Inception's features, which ADM's files hold, are of no use
        yield _dinov2_weights(run)
    asking = next((name for name in PROMPTED if name in run.metrics), None)
    if asking is not None:
        yield from _scored_prompts(run, asking, has_prompts and not run.images_folder)
    for name in ("clip", "aesthetic"):
        if name in run.metrics:
            yield _clip_weights(run, name)
    if "aesthetic" in run.metrics:
        yield _head(run)
    if "clip_tiny" in run.metrics:
        yield _small_clip()


def _file(what: str, path: str | Path, remedy: str) -> Need:
    if Path(path).expanduser().is_file():
        return Need(what, HERE, str(path))
    return Need(what, MISSING, f"{path} does not exist", remedy)


def _source(run: Run) -> str:
    where = SOURCES.get(run.settings["dataset.name"])
    return "" if where is None else f": {where}"


def _reference(run: Run, name: str, otherwise: str = "") -> Need:
    setting = f"metrics.{name}.reference"
    source = networks.section(run.settings["metrics"], name)["reference"]
    remedy = f"set {setting} to a folder of the real images{otherwise}"
    if source is None:
        return Need("reference", MISSING, f"{setting} is not set", remedy)
    path = Path(source).expanduser()
    if path.is_dir():
        count = len(image_files(path, recursive=True))
        return Need("reference", HERE if count > 1 else MISSING, f"{path} with {count} images")
    if path.is_file():
        return Need("reference", HERE, str(path))
    if path.suffix or "/" in source:
        return Need("reference", MISSING, f"{source} does not exist", remedy)
    return Need("reference", FETCHED, f"{source}, by torch-fidelity")


def _inception_weights(run: Run) -> Need:
    given = run.settings["metrics.inception.weights"]
    if given is not None:
        return _file("Inception", given, "set metrics.inception.weights to a file of them; null: fetched")
    kept = list((Path(torch.hub.get_dir()) / "checkpoints").glob("weights-inception-2015-12-05*"))
    if kept:
        return Need("Inception", HERE, str(kept[0]))
    return Need("Inception", FETCHED, "0.1 GB, by torch-fidelity; else give metrics.inception.weights")


def _dinov2_weights(run: Run) -> Need:
    part = networks.section(run.settings["metrics"], "dinov2")
    if part["weights"] is not None:
        return _file("DINOv2", part["weights"], "set metrics.dinov2.weights to a file of them; null: fetched")
    release = dinov2.release_of(part["model"])
    if release.path.is_file():
        return Need("DINOv2", HERE, str(release.path))
    return Need("DINOv2", FETCHED, f"{release.url}; else give metrics.dinov2.weights")


def _scored_prompts(run: Run, name: str, has_prompts: bool) -> Iterator[Need]:
    """Return the need for a file with the prompt of every scored image, which may be other than the task's own."""
    setting = f"metrics.{name}.prompts"
    if networks.section(run.settings["metrics"], name)["prompts"] is None:
        if not has_prompts:
            remedy = f"set {setting} to a text file whose line i belongs to image i"
            yield Need(
                "prompts", MISSING, f"the scored images have none of their own, and {setting} is not set", remedy
            )
        return
    try:
        yield Need("prompts", HERE, f"{len(run.prompts or ())} of {setting}")
    except EdadmError as error:
        yield Need("prompts", MISSING, f"{setting}: {error}")


def _clip_weights(run: Run, name: str) -> Need:
    given = networks.section(run.settings["metrics"], name)["weights"]
    if given is not None:
        return _file(name, given, f"set metrics.{name}.weights to a file of them; null: fetched")
    return Need(name, FETCHED, f"by open_clip unless it has them; else give metrics.{name}.weights")


def _head(run: Run) -> Need:
    given = str(networks.section(run.settings["metrics"], "aesthetic")["head"])
    choices = f"set metrics.aesthetic.head to {', '.join(aesthetic.HEADS)} or the file of a head"
    return _file("head", aesthetic.HEADS.get(given, given), choices)


def _small_clip() -> Need:
    try:
        clip_tiny.sha256()
    except EdadmError as error:
        return Need("clip_tiny", MISSING, str(error))
    return Need("clip_tiny", HERE, str(clip_tiny.FOLDER))

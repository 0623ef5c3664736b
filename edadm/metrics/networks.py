"""From the configuration group ``metrics`` to the networks of CLIP scores, aesthetic score and FD-DINOv2.

``identities`` says what their values depend on, before anything is computed; ``load`` reads the networks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edadm.errors import EdadmError
from edadm.metrics import aesthetic, clip, clip_tiny, dinov2, references
from edadm.metrics.clip import ClipNetwork
from edadm.store import content_hash


@dataclass(frozen=True)
class Networks:
    """The networks of the metrics asked for, None where a metric is not; reference: of FD-DINOv2."""

    clip: ClipNetwork | None
    aesthetic: aesthetic.AestheticNetwork | None
    dinov2: dinov2.Dinov2Network | None
    reference: references.FeatureReference | None
    clip_tiny: ClipNetwork | None = None


def identities(
    settings: Mapping[str, Any], names: Collection[str], prompts: Sequence[str] | None
) -> dict[str, dict[str, Any]]:
    """Return what identifies the networks, prompts and references of the metrics asked for, for keys and records.

    settings: the group ``metrics``. Weights that are not there are downloaded. Raises EdadmError for what is not set,
    cannot be fetched, or has another checksum than expected.
    """
    found: dict[str, dict[str, Any]] = {}
    if "clip" in names:
        part = section(settings, "clip")
        weights = clip.find_weights(part["model"], part["pretrained"], part["weights"], part["sha256"])[1]
        name = clip.name_of(part["model"], part["pretrained"])
        found["clip"] = {"model": name, "weights": weights, "prompts": content_hash(list(prompts or ()))}
    if "clip_tiny" in names:
        found["clip_tiny"] = {"weights": clip_tiny.sha256(), "prompts": content_hash(list(prompts or ()))}
    if "aesthetic" in names:
        part = section(settings, "aesthetic")
        weights = clip.find_weights(*aesthetic.ENCODER, part["weights"], part["sha256"])[1]
        head = aesthetic.load_head(part["head"])
        found["aesthetic"] = {"head": head.name, "head_sha256": head.sha256, "weights": weights}
    if "fd_dinov2" in names:
        part = section(settings, "dinov2")
        reference = references.content_of(_dinov2_reference(part), settings["crop"])
        weights = dinov2.find_weights(part["model"], part["weights"], part["sha256"])[1]
        found["dinov2"] = {"model": part["model"], "weights": weights, "reference": reference}
    return found


def load(settings: Mapping[str, Any], names: Collection[str], device: str) -> Networks:
    """Load the networks of the metrics asked for, one CLIP model once, and the reference of FD-DINOv2."""
    scored = rated = extractor = reference = None
    if "clip" in names:
        part = section(settings, "clip")
        scored = clip.load_network(part["model"], part["pretrained"], part["weights"], part["sha256"], device)
    if "aesthetic" in names:
        part = section(settings, "aesthetic")
        rated = aesthetic.load_network(part["head"], part["weights"], part["sha256"], device, have=scored)
    if "fd_dinov2" in names:
        part = section(settings, "dinov2")
        extractor = dinov2.load_network(part["model"], part["weights"], part["sha256"], device)
        reference = dinov2.reference_from(_dinov2_reference(part), extractor, settings["crop"])
    small = clip_tiny.load_network(device) if "clip_tiny" in names else None
    return Networks(scored, rated, extractor, reference, small)


def section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return a section of the group ``metrics``. Raises EdadmError when the file that was chosen has none."""
    found: Mapping[str, Any] | None = settings.get(name)
    if found is None:
        raise EdadmError(f"metrics.names needs the settings metrics.{name}: choose metrics={name} or another with them")
    return found


def _dinov2_reference(part: Mapping[str, Any]) -> str:
    if part["reference"] is None:
        raise EdadmError("metrics.dinov2.reference is not set: give a folder of images, an .npz, or cifar10-train")
    return str(part["reference"])

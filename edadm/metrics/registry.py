"""The metrics by name, and one function that scores images with any of them in as few feature passes as possible."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from edadm.errors import EdadmError
from edadm.metrics import aesthetic, bootstrap, clip, clip_tiny, crops, dinov2, inception, paired, tiny
from edadm.metrics.frechet import NotAvailable
from edadm.metrics.images import check_images
from edadm.metrics.inception_network import InceptionNetwork
from edadm.metrics.references import FeatureReference
from edadm.prompts import check_prompts

COMPARABLE_N = 5000  # below, a distance to data says nothing about published ones


@dataclass(frozen=True)
class MetricInfo:
    """A metric as tables show it.

    kind: "reference" (distance to reference data), "set" (of the images alone) or "paired" (to the full-precision
    images of the same noise). proxy: measured in the embedded features, never to be named FID, sFID or IS. version:
    raised when values change. title and unit are what a table's head prints.
    """

    title: str
    higher_is_better: bool
    kind: Literal["reference", "set", "paired"]
    proxy: bool = False
    version: int = 1
    unit: str = ""


METRICS: dict[str, MetricInfo] = {
    "fid": MetricInfo("FID", False, "reference"),
    "sfid": MetricInfo("sFID", False, "reference"),
    "is": MetricInfo("IS", True, "set"),
    "kid": MetricInfo("KID", False, "reference"),
    "precision": MetricInfo("precision", True, "reference"),
    "recall": MetricInfo("recall", True, "reference"),
    "fd_tiny": MetricInfo("FD-tiny", False, "reference", proxy=True),
    "fd_tiny_infinity": MetricInfo("FD-tiny, n to infinity", False, "reference", proxy=True),
    "sfd_tiny": MetricInfo("sFD-tiny", False, "reference", proxy=True),
    "is_tiny": MetricInfo("IS-tiny", True, "set", proxy=True),
    "fd_tiny_to_fp": MetricInfo("FD-tiny to FP", False, "paired", proxy=True),
    "sqnr": MetricInfo("SQNR of the noise prediction", True, "paired", unit="dB"),
    "psnr": MetricInfo("PSNR to FP", True, "paired", unit="dB"),
    "ssim": MetricInfo("SSIM to FP", True, "paired"),
    "clip": MetricInfo("CLIP score", True, "set"),
    "clip_tiny": MetricInfo("CLIP-tiny", True, "set", proxy=True),
    "aesthetic": MetricInfo("aesthetic score", True, "set"),
    "fd_dinov2": MetricInfo("FD-DINOv2", False, "reference"),
}
PART = 512  # images that are cropped at a time, whole batches of every feature network
INCEPTION_LAYERS = ("pooled", "spatial", "logits")
INCEPTION = ("fid", "sfid", "is", "kid", "precision", "recall")  # measured in Inception's features
PROMPTED = ("clip", "clip_tiny")  # of an image and its prompt
TINY = ("fd_tiny", "fd_tiny_infinity", "sfd_tiny", "is_tiny", "fd_tiny_to_fp")  # in the embedded features

Keep = Callable[[str, np.ndarray], None]
"""Receives a name and an array with a row for every image."""


def _forget(name: str, rows: np.ndarray) -> None:
    pass


@dataclass(frozen=True)
class Reference:
    """What images are compared with, one entry for each feature network in use."""

    tiny: tiny.TinyReference | None = None
    inception: inception.InceptionReference | None = None
    dinov2: FeatureReference | None = None


def score(
    images: torch.Tensor,
    metric_names: Iterable[str],
    reference: Reference,
    fp_images: torch.Tensor | None = None,
    *,
    tiny_network: tiny.TinyNetwork | None = None,
    inception_network: InceptionNetwork | None = None,
    clip_network: clip.ClipNetwork | None = None,
    clip_tiny_network: clip.ClipNetwork | None = None,
    aesthetic_network: aesthetic.AestheticNetwork | None = None,
    dinov2_network: dinov2.Dinov2Network | None = None,
    prompts: Sequence[str] | None = None,
    crop: str | None = None,
    step_sqnr: paired.StepSQNR | None = None,
    seed: int = 0,
    resamples: int = bootstrap.RESAMPLES,
    keep: Keep | None = None,
) -> dict[str, dict[str, Any]]:
    """Score uint8 images (N, 3, H, W) and return a result for each metric, in the order asked for.

    fp_images: the full-precision model's images from the same noise, row by row; without them (the full-precision row
    itself) paired metrics are n/a. prompts: one for each image, for ``PROMPTED``. crop: of ``crops.CROPS``, what the
    reference's images went through; the images get the same before features of Inception, CLIP and DINOv2 and for no
    other metric. step_sqnr: of ``paired.sqnr_per_step``, for ``sqnr``. seed: of the resampling. keep: receives what a
    large network says of every image (``draws.KEPT``), so that it need not run again. A network is needed for the
    metrics that use it; the embedded one is loaded by itself.

    A result is a dict of JSON types: ``value`` (None is n/a), ``n``, ``reason`` (of n/a), ``interval`` (95 % of the
    value, for means over images only: see ``bootstrap``), ``title``, ``unit``, ``higher_is_better``, ``kind``,
    ``proxy``, ``version``; where features are used ``network``, ``network_sha256``; for kind "reference" ``reference``,
    ``reference_n``, and ``reference_protocol`` where its images were cropped or its statistics are another program's;
    ``note`` where n is too small for published values. Distances in embedded features carry ``difference_to_fp``:
    value, interval, corrected, corrected_interval, resamples (``bootstrap.FrechetDifference``), CLIP and aesthetic
    scores its value and interval.

    Raises EdadmError for an unknown metric, one whose reference, network or prompts are not given, prompts that do not
    count as the images do, and a reference of images of another size.
    """
    names = list(metric_names)
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise EdadmError(f"unknown metric {', '.join(unknown)}: choose from {', '.join(METRICS)}")
    check_images(images)
    if fp_images is not None and fp_images.shape != images.shape:
        raise EdadmError(
            f"{len(images)} images {tuple(images.shape[1:])} do not pair up with {len(fp_images)} full-precision ones "
            f"{tuple(fp_images.shape[1:])}: both need the same noise and number"
        )
    for name in PROMPTED:
        if name in names:
            check_prompts(() if prompts is None else prompts, len(images), f"{name} needs prompts")
    run = _Run(
        images, fp_images, reference, tiny_network, inception_network, clip_network, clip_tiny_network,
        aesthetic_network, dinov2_network, prompts or (), crop, step_sqnr, seed, resamples, keep or _forget,
    )  # fmt: skip
    return {name: _result(name, run) for name in names}


@dataclass
class _Run:
    """The inputs of one call, and the features that its metrics share."""

    images: torch.Tensor
    fp_images: torch.Tensor | None
    reference: Reference
    given_tiny_network: tiny.TinyNetwork | None
    given_inception_network: InceptionNetwork | None
    given_clip_network: clip.ClipNetwork | None
    given_clip_tiny_network: clip.ClipNetwork | None
    given_aesthetic_network: aesthetic.AestheticNetwork | None
    given_dinov2_network: dinov2.Dinov2Network | None
    prompts: Sequence[str]
    crop: str | None
    step_sqnr: paired.StepSQNR | None
    seed: int
    resamples: int
    keep: Keep
    _kept_embeddings: dict[tuple[str, str, str], torch.Tensor] = field(default_factory=dict)

    @property
    def rng(self) -> np.random.Generator:
        """A fresh generator, so that the draws of one metric do not depend on which others were asked for."""
        return np.random.default_rng(self.seed)

    @cached_property
    def tiny_network(self) -> tiny.TinyNetwork:
        return self.given_tiny_network or tiny.load_network()

    @cached_property
    def inception_network(self) -> InceptionNetwork:
        if self.given_inception_network is None:
            raise EdadmError("fid, sfid, is, kid, precision and recall need inception_network: load it and pass it")
        return self.given_inception_network

    @cached_property
    def tiny_reference(self) -> tiny.TinyReference:
        if self.reference.tiny is None:
            raise EdadmError("the embedded proxies need Reference.tiny: tiny.load_reference() or tiny.build_reference")
        tiny.check_same_network(self.reference.tiny, self.tiny_network)
        return self.reference.tiny

    @cached_property
    def inception_reference(self) -> inception.InceptionReference:
        if self.reference.inception is None:
            raise EdadmError("fid, sfid, kid, precision and recall need Reference.inception: inception.reference_from")
        return self._of_this_size(self.reference.inception)

    @cached_property
    def clip_network(self) -> clip.ClipNetwork:
        if self.given_clip_network is None:
            raise EdadmError("clip needs clip_network: load it with clip.load_network and pass it")
        return self.given_clip_network

    @cached_property
    def clip_tiny_network(self) -> clip.ClipNetwork:
        return self.given_clip_tiny_network or clip_tiny.load_network()

    @cached_property
    def aesthetic_network(self) -> aesthetic.AestheticNetwork:
        if self.given_aesthetic_network is None:
            raise EdadmError("aesthetic needs aesthetic_network: load it with aesthetic.load_network and pass it")
        return self.given_aesthetic_network

    @cached_property
    def dinov2_network(self) -> dinov2.Dinov2Network:
        if self.given_dinov2_network is None:
            raise EdadmError("fd_dinov2 needs dinov2_network: load it with dinov2.load_network and pass it")
        return self.given_dinov2_network

    @cached_property
    def dinov2_reference(self) -> FeatureReference:
        if self.reference.dinov2 is None:
            raise EdadmError("fd_dinov2 needs Reference.dinov2: dinov2.reference_from")
        return self._of_this_size(self.reference.dinov2)

    def _of_this_size(self, reference: FeatureReference) -> FeatureReference:
        first = crops.crop_all(self.images[:1], self.crop)
        size = (first.shape[2], first.shape[3])
        if reference.size is not None and reference.size != size:
            raise EdadmError(
                f"the images of reference {reference.name!r} are {reference.size[1]} x {reference.size[0]}, the scored "
                f"ones {size[1]} x {size[0]}: choose the reference of this size, or metrics.crop for both"
            )
        return reference

    def cropped(self, images: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield images as they go into the large feature networks, in parts of whole batches of any of these."""
        return (crops.crop_all(part, self.crop) for part in images.split(PART))

    def embeddings(self, network: clip.ClipNetwork) -> torch.Tensor:
        """Return the CLIP embeddings of the images, made once for all metrics of one CLIP model."""
        return self._embedded("images", network, self.images)

    def fp_embeddings(self, network: clip.ClipNetwork) -> torch.Tensor:
        """Return the CLIP embeddings of the full-precision images."""
        return self._embedded("fp_images", network, self.fp())

    def _embedded(self, which: str, network: clip.ClipNetwork, images: torch.Tensor) -> torch.Tensor:
        key = (which, network.name, network.sha256)
        if key not in self._kept_embeddings:
            parts = [clip.image_embeddings(part, network) for part in self.cropped(images)]
            self._kept_embeddings[key] = torch.cat(parts)
        return self._kept_embeddings[key]

    @cached_property
    def tiny_features(self) -> tiny.TinyFeatures:
        return tiny.extract(self.images, self.tiny_network)

    @cached_property
    def fp_tiny_features(self) -> tiny.TinyFeatures:
        return tiny.extract(self.fp(), self.tiny_network)

    @cached_property
    def inception_features(self) -> inception.InceptionFeatures:
        parts = [inception.extract(part, self.inception_network) for part in self.cropped(self.images)]
        layers = {layer: torch.cat([getattr(part, layer) for part in parts]) for layer in INCEPTION_LAYERS}
        for layer, features in layers.items():
            self.keep(f"inception.{layer}", features.numpy())
        return inception.InceptionFeatures(**layers)

    @cached_property
    def precision_recall(self) -> tuple[float, float]:
        return inception.precision_recall(self.inception_features, self.inception_reference)

    def fp(self) -> torch.Tensor:
        if self.fp_images is None:
            raise NotAvailable("no full-precision images to compare with")
        return self.fp_images


def _result(name: str, run: _Run) -> dict[str, Any]:
    info = METRICS[name]
    result: dict[str, Any] = {"value": None, "n": len(run.images), "reason": None, "interval": None}
    result.update(title=info.title, unit=info.unit, higher_is_better=info.higher_is_better)
    result.update(kind=info.kind, proxy=info.proxy, version=info.version)
    try:
        result.update(_SCORERS[name](run))
    except NotAvailable as error:
        result["reason"] = str(error)
    return result


def _tiny_protocol(run: _Run) -> dict[str, Any]:
    return {"network": "cifar10_tiny_features", "network_sha256": run.tiny_network.sha256}


_LAYERS: dict[str, Literal["pooled", "spatial"]] = {"fd_tiny": "pooled", "sfd_tiny": "spatial"}


def _tiny_distance(run: _Run, name: str) -> dict[str, Any]:
    reference = run.tiny_reference
    measure = tiny.fd_tiny if name == "fd_tiny" else tiny.sfd_tiny
    result = {"value": measure(run.tiny_features, reference), "reference": reference.name, "reference_n": reference.n}
    if run.fp_images is not None:
        result["difference_to_fp"] = _frechet_difference(run, run.tiny_features, run.fp_tiny_features, _LAYERS[name])
    return result | _tiny_protocol(run)


def _frechet_difference(
    run: _Run, a: tiny.TinyFeatures, b: tiny.TinyFeatures, layer: Literal["pooled", "spatial"]
) -> dict[str, Any]:
    statistics = getattr(run.tiny_reference, layer)
    found = bootstrap.frechet_difference(getattr(a, layer), getattr(b, layer), statistics, run.rng, run.resamples)
    return {
        "value": found.at_n.value,
        "interval": [found.at_n.low, found.at_n.high],
        "corrected": found.corrected.value,
        "corrected_interval": [found.corrected.low, found.corrected.high],
        "resamples": run.resamples,
    }


def _tiny_infinity(run: _Run) -> dict[str, Any]:
    reference = run.tiny_reference
    value = bootstrap.frechet_infinity(run.tiny_features.pooled, reference.pooled, run.rng)
    return {"value": value, "reference": reference.name, "reference_n": reference.n} | _tiny_protocol(run)


def _tiny_to_fp(run: _Run) -> dict[str, Any]:
    run.fp()
    return {"value": tiny.fd_tiny(run.tiny_features, run.fp_tiny_features)} | _tiny_protocol(run)


def _inception(run: _Run, measure: Callable[[_Run], float | tuple[float, float]]) -> dict[str, Any]:
    value = measure(run)
    result: dict[str, Any] = {"network": "inception-v3-compat", "network_sha256": run.inception_network.sha256}
    if isinstance(value, tuple):
        result.update(value=value[0], split_deviation=value[1])
    else:
        result["value"] = value
    if len(run.images) < COMPARABLE_N:
        result["note"] = f"n={len(run.images)} is below {COMPARABLE_N}: not comparable with published values"
    return result


def _inception_distance(run: _Run, measure: Callable[[_Run], float | tuple[float, float]]) -> dict[str, Any]:
    return _inception(run, measure) | _against(run.inception_reference)


def _against(reference: FeatureReference) -> dict[str, Any]:
    found: dict[str, Any] = {"reference": reference.name, "reference_n": reference.n or None}
    return found if reference.protocol is None else found | {"reference_protocol": reference.protocol}


def _clip(run: _Run, name: str, network: clip.ClipNetwork) -> dict[str, Any]:
    prompts = clip.text_embeddings(run.prompts, network)
    result = _embedded_mean(run, name, network, lambda embeddings: clip.scores(embeddings, prompts))
    return result | {"network": network.name}


def _aesthetic(run: _Run) -> dict[str, Any]:
    network, head = run.aesthetic_network.clip, run.aesthetic_network.head
    result = _embedded_mean(run, "aesthetic", network, lambda embeddings: aesthetic.scores(embeddings, head))
    return result | {"network": f"{network.name}, head {head.name}", "head_sha256": head.sha256}


def _embedded_mean(
    run: _Run, name: str, network: clip.ClipNetwork, measure: Callable[[torch.Tensor], np.ndarray]
) -> dict[str, Any]:
    """Return the mean over images of a value of their CLIP embeddings, and its paired difference to full precision."""
    values = measure(run.embeddings(network))
    run.keep(name, values)
    result = _mean(run, values) | {"network_sha256": network.sha256}
    if run.fp_images is not None and len(values) > 1:
        result["difference_to_fp"] = _mean(run, values - measure(run.fp_embeddings(network)))
    return result


def _fd_dinov2(run: _Run) -> dict[str, Any]:
    network, reference = run.dinov2_network, run.dinov2_reference
    features = torch.cat([dinov2.extract(part, network) for part in run.cropped(run.images)])
    run.keep("dinov2", features.numpy())
    value = dinov2.fd_dinov2(features, reference.pooled)
    return {"value": value, "network": network.name, "network_sha256": network.sha256} | _against(reference)


def _mean(run: _Run, values: np.ndarray) -> dict[str, Any]:
    if len(values) < 2:
        return {"value": float(values.mean())}
    estimate = bootstrap.mean_interval(values, run.rng)
    return {"value": estimate.value, "interval": [estimate.low, estimate.high]}


def _sqnr(run: _Run) -> dict[str, Any]:
    if run.step_sqnr is None:
        raise NotAvailable("no noise predictions of the full-precision trajectory to compare with")
    return paired.summary(run.step_sqnr, run.rng)


_SCORERS: dict[str, Callable[[_Run], dict[str, Any]]] = {
    "fid": lambda run: _inception_distance(run, lambda r: inception.fid(r.inception_features, r.inception_reference)),
    "sfid": lambda run: _inception_distance(run, lambda r: inception.sfid(r.inception_features, r.inception_reference)),
    "is": lambda run: _inception(run, lambda r: inception.inception_score(r.inception_features)),
    "kid": lambda run: _inception_distance(run, lambda r: inception.kid(r.inception_features, r.inception_reference)),
    "precision": lambda run: _inception_distance(run, lambda r: r.precision_recall[0]),
    "recall": lambda run: _inception_distance(run, lambda r: r.precision_recall[1]),
    "fd_tiny": lambda run: _tiny_distance(run, "fd_tiny"),
    "fd_tiny_infinity": _tiny_infinity,
    "sfd_tiny": lambda run: _tiny_distance(run, "sfd_tiny"),
    "is_tiny": lambda run: {"value": tiny.is_tiny(run.tiny_features)} | _tiny_protocol(run),
    "fd_tiny_to_fp": _tiny_to_fp,
    "sqnr": _sqnr,
    "psnr": lambda run: _mean(run, paired.psnr(run.fp(), run.images)),
    "ssim": lambda run: _mean(run, paired.ssim(run.fp(), run.images)),
    "clip": lambda run: _clip(run, "clip", run.clip_network),
    "clip_tiny": lambda run: _clip(run, "clip_tiny", run.clip_tiny_network),
    "aesthetic": _aesthetic,
    "fd_dinov2": _fd_dinov2,
}

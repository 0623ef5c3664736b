"""One function that scores images with any of the metrics in as few feature passes as possible."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from edadm.errors import EdadmError
from edadm.metrics import aesthetic, bootstrap, clip, dinov2, inception, paired, tiny
from edadm.metrics.frechet import NotAvailable
from edadm.metrics.images import check_images
from edadm.metrics.inception_network import InceptionNetwork
from edadm.metrics.references import FeatureReference
from edadm.metrics.registry import METRICS, PROMPTED
from edadm.metrics.scored_images import Keep, Reference, ScoredImages
from edadm.prompts import check_prompts

Measure = Callable[[ScoredImages], "float | tuple[float, float]"]

COMPARABLE_N = 5000  # below, a distance to data says nothing about published ones


def _forget(name: str, rows: np.ndarray) -> None:
    pass


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
    scored = ScoredImages(
        images, fp_images, reference, tiny_network, inception_network, clip_network, clip_tiny_network,
        aesthetic_network, dinov2_network, prompts or (), crop, step_sqnr, seed, resamples, keep or _forget,
    )  # fmt: skip
    return {name: _result(name, scored) for name in names}


def _result(name: str, scored: ScoredImages) -> dict[str, Any]:
    info = METRICS[name]
    result: dict[str, Any] = {"value": None, "n": len(scored.images), "reason": None, "interval": None}
    result.update(title=info.title, unit=info.unit, higher_is_better=info.higher_is_better)
    result.update(kind=info.kind, proxy=info.proxy, version=info.version)
    try:
        result.update(_SCORERS[name](scored))
    except NotAvailable as error:
        result["reason"] = str(error)
    return result


def _tiny_protocol(scored: ScoredImages) -> dict[str, Any]:
    return {"network": "cifar10_tiny_features", "network_sha256": scored.tiny_network.sha256}


_LAYERS: dict[str, Literal["pooled", "spatial"]] = {"fd_tiny": "pooled", "sfd_tiny": "spatial"}


def _tiny_distance(scored: ScoredImages, name: str) -> dict[str, Any]:
    reference = scored.tiny_reference
    measure = tiny.fd_tiny if name == "fd_tiny" else tiny.sfd_tiny
    result = {
        "value": measure(scored.tiny_features, reference),
        "reference": reference.name,
        "reference_n": reference.n,
    }
    if scored.fp_images is not None:
        result["difference_to_fp"] = _frechet_difference(
            scored, scored.tiny_features, scored.fp_tiny_features, _LAYERS[name]
        )
    return result | _tiny_protocol(scored)


def _frechet_difference(
    scored: ScoredImages, a: tiny.TinyFeatures, b: tiny.TinyFeatures, layer: Literal["pooled", "spatial"]
) -> dict[str, Any]:
    statistics = getattr(scored.tiny_reference, layer)
    found = bootstrap.frechet_difference(getattr(a, layer), getattr(b, layer), statistics, scored.rng, scored.resamples)
    return {
        "value": found.at_n.value,
        "interval": [found.at_n.low, found.at_n.high],
        "corrected": found.corrected.value,
        "corrected_interval": [found.corrected.low, found.corrected.high],
        "resamples": scored.resamples,
    }


def _tiny_infinity(scored: ScoredImages) -> dict[str, Any]:
    reference = scored.tiny_reference
    value = bootstrap.frechet_infinity(scored.tiny_features.pooled, reference.pooled, scored.rng)
    return {"value": value, "reference": reference.name, "reference_n": reference.n} | _tiny_protocol(scored)


def _tiny_to_fp(scored: ScoredImages) -> dict[str, Any]:
    scored.fp()
    return {"value": tiny.fd_tiny(scored.tiny_features, scored.fp_tiny_features)} | _tiny_protocol(scored)


def _inception(scored: ScoredImages, measure: Measure) -> dict[str, Any]:
    value = measure(scored)
    result: dict[str, Any] = {"network": "inception-v3-compat", "network_sha256": scored.inception_network.sha256}
    if isinstance(value, tuple):
        result.update(value=value[0], split_deviation=value[1])
    else:
        result["value"] = value
    if len(scored.images) < COMPARABLE_N:
        result["note"] = f"n={len(scored.images)} is below {COMPARABLE_N}: not comparable with published values"
    return result


def _inception_distance(scored: ScoredImages, measure: Measure) -> dict[str, Any]:
    return _inception(scored, measure) | _against(scored.inception_reference)


def _fid_infinity(scored: ScoredImages) -> float:
    device = next(scored.inception_network.extractor.parameters()).device
    return inception.fid_infinity(scored.inception_features, scored.inception_reference, scored.rng, device)


def _against(reference: FeatureReference) -> dict[str, Any]:
    found: dict[str, Any] = {"reference": reference.name, "reference_n": reference.n or None}
    return found if reference.protocol is None else found | {"reference_protocol": reference.protocol}


def _clip(scored: ScoredImages, name: str, network: clip.ClipNetwork) -> dict[str, Any]:
    prompts = clip.text_embeddings(scored.prompts, network)
    result = _embedded_mean(scored, name, network, lambda embeddings: clip.scores(embeddings, prompts))
    return result | {"network": network.name}


def _aesthetic(scored: ScoredImages) -> dict[str, Any]:
    network, head = scored.aesthetic_network.clip, scored.aesthetic_network.head
    result = _embedded_mean(scored, "aesthetic", network, lambda embeddings: aesthetic.scores(embeddings, head))
    return result | {"network": f"{network.name}, head {head.name}", "head_sha256": head.sha256}


def _embedded_mean(
    scored: ScoredImages, name: str, network: clip.ClipNetwork, measure: Callable[[torch.Tensor], np.ndarray]
) -> dict[str, Any]:
    """Return the mean over images of a value of their CLIP embeddings, and its paired difference to full precision."""
    values = measure(scored.embeddings(network))
    scored.keep(name, values)
    result = _mean(scored, values) | {"network_sha256": network.sha256}
    if scored.fp_images is not None and len(values) > 1:
        result["difference_to_fp"] = _mean(scored, values - measure(scored.fp_embeddings(network)))
    return result


def _fd_dinov2(scored: ScoredImages) -> dict[str, Any]:
    network, reference = scored.dinov2_network, scored.dinov2_reference
    features = torch.cat([dinov2.extract(part, network) for part in scored.cropped(scored.images)])
    scored.keep("dinov2", features.numpy())
    value = dinov2.fd_dinov2(features, reference.pooled)
    return {"value": value, "network": network.name, "network_sha256": network.sha256} | _against(reference)


def _mean(scored: ScoredImages, values: np.ndarray) -> dict[str, Any]:
    if len(values) < 2:
        return {"value": float(values.mean())}
    estimate = bootstrap.mean_interval(values, scored.rng)
    return {"value": estimate.value, "interval": [estimate.low, estimate.high]}


def _sqnr(scored: ScoredImages) -> dict[str, Any]:
    if scored.step_sqnr is None:
        raise NotAvailable("no noise predictions of the full-precision trajectory to compare with")
    return paired.summary(scored.step_sqnr, scored.rng)


_SCORERS: dict[str, Callable[[ScoredImages], dict[str, Any]]] = {
    "fid": lambda scored: _inception_distance(
        scored, lambda r: inception.fid(r.inception_features, r.inception_reference)
    ),
    "fid_infinity": lambda scored: _inception_distance(scored, _fid_infinity),
    "sfid": lambda scored: _inception_distance(
        scored, lambda r: inception.sfid(r.inception_features, r.inception_reference)
    ),
    "is": lambda scored: _inception(scored, lambda r: inception.inception_score(r.inception_features)),
    "kid": lambda scored: _inception_distance(
        scored, lambda r: inception.kid(r.inception_features, r.inception_reference)
    ),
    "precision": lambda scored: _inception_distance(scored, lambda r: r.precision_recall[0]),
    "recall": lambda scored: _inception_distance(scored, lambda r: r.precision_recall[1]),
    "fd_tiny": lambda scored: _tiny_distance(scored, "fd_tiny"),
    "fd_tiny_infinity": _tiny_infinity,
    "sfd_tiny": lambda scored: _tiny_distance(scored, "sfd_tiny"),
    "is_tiny": lambda scored: {"value": tiny.is_tiny(scored.tiny_features)} | _tiny_protocol(scored),
    "fd_tiny_to_fp": _tiny_to_fp,
    "sqnr": _sqnr,
    "psnr": lambda scored: _mean(scored, paired.psnr(scored.fp(), scored.images)),
    "ssim": lambda scored: _mean(scored, paired.ssim(scored.fp(), scored.images)),
    "clip": lambda scored: _clip(scored, "clip", scored.clip_network),
    "clip_tiny": lambda scored: _clip(scored, "clip_tiny", scored.clip_tiny_network),
    "aesthetic": _aesthetic,
    "fd_dinov2": _fd_dinov2,
}

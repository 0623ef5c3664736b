"""The images of one scoring, and what its metrics share: networks, references and the features of each network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from edadm.errors import EdadmError
from edadm.metrics import aesthetic, clip, clip_tiny, crops, dinov2, inception, paired, tiny
from edadm.metrics.frechet import NotAvailable
from edadm.metrics.inception_network import InceptionNetwork
from edadm.metrics.references import FeatureReference

PART = 512  # images that are cropped at a time, whole batches of every feature network
INCEPTION_LAYERS = ("pooled", "spatial", "logits")

Keep = Callable[[str, np.ndarray], None]
"""Receives a name and an array with a row for every image."""


@dataclass(frozen=True)
class Reference:
    """What images are compared with, one entry for each feature network in use."""

    tiny: tiny.TinyReference | None = None
    inception: inception.InceptionReference | None = None
    dinov2: FeatureReference | None = None


@dataclass
class ScoredImages:
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

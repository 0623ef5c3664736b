"""torch-fidelity's Inception with the spatial features of sFID, loaded from checked weights without unpickling code."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from edadm.environment import check_torchvision
from edadm.errors import EdadmError

if TYPE_CHECKING:
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

logger = logging.getLogger(__name__)

EXTRACTOR_NAME = "edadm-inception"
RELEASE_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
FEATURES = ("2048", "spatial", "logits_unbiased")
SPATIAL_CHANNELS = 7


@dataclass(frozen=True)
class InceptionNetwork:
    """The feature extractor, and the sha256 of its weight file."""

    extractor: FeatureExtractorBase
    sha256: str


def load_network(
    weights: str | os.PathLike | None = None,
    sha256: str | None = RELEASE_SHA256,
    device: torch.device | str = "cpu",
) -> InceptionNetwork:
    """Load Inception from a file, or from torch-fidelity's release, downloaded once to torch's hub folder.

    sha256: the expected checksum of the file; None accepts any with a warning. Raises EdadmError for a missing file,
    another checksum, a failed download, or a file that does not hold the network.
    """
    path, found = find_weights(weights, sha256)
    extractor = extractor_class()(EXTRACTOR_NAME, list(FEATURES), path)
    return InceptionNetwork(extractor.eval().requires_grad_(False).to(device), found)


def find_weights(weights: str | os.PathLike | None = None, sha256: str | None = RELEASE_SHA256) -> tuple[Path, str]:
    """Return the path and the sha256 of the Inception weights; without a path, of torch-fidelity's own download.

    The download is always checked against the release's checksum. Raises EdadmError as ``load_network`` says.
    """
    path = Path(weights) if weights is not None else _release()
    expected = sha256 if weights is not None else RELEASE_SHA256
    if not path.is_file():
        raise EdadmError(f"no Inception weights at {path}: {_remedy()}")
    found = _file_sha256(path)
    if expected is not None and found != expected:
        raise EdadmError(
            f"{path} has sha256 {found}, expected {expected}: it is damaged or another network. Remove it and "
            f"{_remedy()}, or state the checksum you expect."
        )
    if found != RELEASE_SHA256:
        logger.warning("Inception weights %s (sha256 %s) are not the release: no published FID", path, found[:8])
    return path, found


@functools.cache
def extractor_class() -> type[FeatureExtractorBase]:
    """Return the extractor class, registered in torch-fidelity as ``edadm-inception``.

    It adds ``spatial`` (B, 2023) to the features of torch-fidelity's class: the first 7 channels of the output of
    ``Mixed_6d.branch1x1`` at 17 x 17, called ``mixed_6/conv`` in ADM's evaluator (Nash et al. 2021).
    """
    check_torchvision()
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    from torch_fidelity.registry import register_feature_extractor

    class InceptionWithSpatial(FeatureExtractorBase):
        def __init__(self, name, features_list, feature_extractor_weights_path=None, **_):
            super().__init__(name, features_list)
            standard = [feature for feature in features_list if feature != "spatial"] or ["768"]
            path = Path(feature_extractor_weights_path or find_weights()[0])
            state = _load_state(path)
            try:
                with torch.random.fork_rng(devices=[]):  # the constructor draws weights that are then replaced
                    self.network = FeatureExtractorInceptionV3(name, standard, state)
            except (RuntimeError, TypeError, AttributeError) as error:
                raise EdadmError(f"{path} does not hold torch-fidelity's Inception: {error}") from error
            self._spatial: torch.Tensor | None = None
            self.network.Mixed_6d.branch1x1.register_forward_hook(self._tap)

        def _tap(self, module, inputs, output):
            self._spatial = output[:, :SPATIAL_CHANNELS].flatten(1).to(torch.float32, copy=True)

        def forward(self, x):
            values = self.network.convert_features_tuple_to_dict(self.network(x))
            values["spatial"], self._spatial = self._spatial, None
            return tuple(values[feature] for feature in self.features_list)

        @staticmethod
        def get_provided_features_list():
            return (*FeatureExtractorInceptionV3.get_provided_features_list(), "spatial")

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return FeatureExtractorInceptionV3.get_default_feature_layer_for_metric(metric)

        @staticmethod
        def can_be_compiled():
            return False

    register_feature_extractor(EXTRACTOR_NAME, InceptionWithSpatial)
    return InceptionWithSpatial


def _load_state(path: Path) -> io.BytesIO:
    """Read a state dict without running code from it, as a file object for torch-fidelity's own ``torch.load``.

    That call uses ``weights_only=False``; it must only ever see bytes that were written here.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise EdadmError(f"{path} is no readable state dict (only tensors are accepted): {error}") from error
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


def _release() -> Path:
    """Return torch-fidelity's released weights in torch's hub folder, downloading them once."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[1]
    if path.is_file():
        return path
    logger.info("downloading the Inception weights (91 MiB) to %s", path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=RELEASE_SHA256, progress=False)
    except (OSError, RuntimeError) as error:
        raise EdadmError(f"no Inception weights at {path} and the download failed ({error}): {_remedy()}") from error
    return path


def _remedy() -> str:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return f"fetch {URL_INCEPTION_V3} and give its path"


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""What the rest of edadm needs to know of a task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from edadm.errors import EdadmError
from edadm.store import content_hash, file_sha256

if TYPE_CHECKING:
    import torch
    from torch import nn

    from edadm.quant.network import QuantModel
    from edadm.sampling.guidance import Conditions
    from edadm.sampling.interface import DiffusionSampler

PIPELINE = "pipeline"  # the task of a user's own pipeline
_OF_A_MODEL = (".json", ".safetensors", ".bin")
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
_OF_A_TOKENIZER = ("merges.txt", "vocab.txt")


class Decoder(Protocol):
    """What makes images of samples that are latents; nothing is read before it is called."""

    version: ClassVar[int]

    def on(self, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the function from float32 latents (B, c, h, w) to uint8 images (B, 3, H, W)."""


@dataclass(frozen=True)
class Own:
    """What a model says for itself where the configuration leaves it open.

    denoiser_class: in diffusers. sampler: (steps, eta) to its own sampler, for ``sampler=own``. schedule: the numbers
    of other samplers, by their names, that are null in the configuration. guidance_scale: where that is null.
    embeds_guidance: the scale is an input of the network, not a second row. takes_prompts: its conditions are texts.
    features: the modules that ``model.features`` means. adapt: makes a denoiser take a sample and rows of conditions by
    name, as all stages give them. size: parameters of the denoiser and multiply-accumulates of one row.
    feature_numbers: of one row of the output of a module.
    """

    denoiser_class: str
    sampler: Callable[[int, float], DiffusionSampler]
    schedule: Mapping[str, Any]
    guidance_scale: float
    embeds_guidance: bool
    takes_prompts: bool
    features: Mapping[str, str]
    adapt: Callable[[nn.Module], nn.Module]
    size: Callable[[], tuple[int, int]]
    feature_numbers: Callable[[str], int]


@dataclass(frozen=True)
class Task:
    """A denoiser, the shape of its samples and what full precision is expected to score.

    weights: the file or folder that the denoiser is read from; None where the user has not said which, and ``remedy``
    then says what to give. load: reads it into a float32 module. others: further files or folders that images depend
    on. hashed: sub-folders of ``weights`` that belong to the checkpoint, default all of it.
    expected_band: metric -> (lowest, highest) value of the full-precision model in the profile ``expected_profile``.
    prediction_type: as diffusers' schedulers name it. learned_variance: the output holds the variance beside the noise.
    conditions: makes what the images are of, at no cost until rows are asked for; None for an unconditional model.
    guided_channels: see `edadm.sampling.guidance.Guidance`. decoder: None where samples are images. own: of a user's
    pipeline; None where the configuration says everything.
    """

    name: str
    weights: Path | None
    sample_shape: tuple[int, int, int]
    load: Callable[[Path], nn.Module]
    expected_band: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    prediction_type: str = "epsilon"
    learned_variance: bool = False
    conditions: Callable[[], Conditions] | None = None
    guided_channels: int | None = None
    decoder: Decoder | None = None
    others: tuple[Path, ...] = ()
    hashed: tuple[str, ...] = ()
    remedy: str = "set model.path"
    expected_profile: str = "reference"
    own: Own | None = None

    def denoiser(self, device: str = "cpu") -> nn.Module:
        """Return the denoiser in float32 and evaluation mode, a new one at each call.

        Raises EdadmError for weights that cannot be read and for those of another model.
        """
        network = self.load(self.location())
        self._require_fit(network, self.location())
        return network.to(device).eval().requires_grad_(False)

    def _require_fit(self, network: nn.Module, place: Path) -> None:
        from edadm.tasks.model_folder import require_denoiser

        if self.own is None:  # which was made of the denoiser's own configuration
            conditional = self.conditions is not None
            require_denoiser(network, str(place), self.sample_shape, conditional, self.learned_variance)

    def quantized(self, folder: Path, device: str = "cpu") -> QuantModel:
        """Return the quantized network of a folder, called as the denoiser is. Raises EdadmError as `io.load` does."""
        from edadm.quant import io

        network = io.load(folder)
        self._require_fit(network.model, folder)
        if self.own is not None:
            self.own.adapt(network.model)
        return network.to(device)

    def location(self) -> Path:
        """Return the file or folder of the weights. Raises EdadmError when none was given or it is not there."""
        if self.weights is None:
            raise EdadmError(f"task {self.name} needs weights: {self.remedy}")
        if not self.weights.exists():
            raise EdadmError(f"model.path={self.weights} does not exist: {self.remedy}")
        return self.weights

    def to_images(self, device: str = "cpu") -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the function from float32 samples to uint8 images."""
        from edadm.sampling.generate import to_uint8

        return to_uint8 if self.decoder is None else self.decoder.on(device)

    def sha256(self) -> str:
        """Return a hash of the checkpoint's files, its identity in every key. Raises EdadmError as `location`."""
        weights = self.location()
        if absent := [path for path in self.others if not path.exists()]:
            raise EdadmError(f"task {self.name} needs {absent[0]}, which does not exist: {self.remedy}")
        identity = _file(weights) if weights.is_file() else _folder(weights, self.hashed)
        if not self.others:
            return identity
        others = [_file(path) if path.is_file() else _folder(path) for path in self.others]
        return content_hash([identity, *others])


def bands(expected: Mapping[str, Sequence[float]] | None) -> dict[str, tuple[float, float]]:
    """Return `Task.expected_band` from entries of [value, largest deviation] by metric."""
    return {name: (value - off, value + off) for name, (value, off) in (expected or {}).items()}


def noise_prediction(network: nn.Module) -> Callable[..., torch.Tensor]:
    """Return the function (x, timestep, condition by name) -> output of a diffusers denoiser, wrapped or not."""

    def denoise(x: torch.Tensor, timestep: torch.Tensor, **condition: torch.Tensor) -> torch.Tensor:
        return network(x, timestep=timestep, **condition, return_dict=False)[0]

    return denoise


@contextmanager
def fitting(network: str, task: str, sample_shape: Sequence[int]) -> Iterator[None]:
    """Raise EdadmError where a network does not take samples of a shape (C, H, W) and the conditions of a task.

    network, task: their names, for the message.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise EdadmError(
            f"{network} does not take samples of {list(sample_shape)} and the conditions of task {task} ({reason}): is "
            "it that of another task? Else set model.sample_shape"
        ) from error


def require_size(output: torch.Tensor, sample_shape: Sequence[int]) -> None:
    """Raise ValueError for an output of another height and width than the sample."""
    if tuple(output.shape[2:]) != tuple(sample_shape[1:]):
        raise ValueError(f"it returns {list(output.shape[1:])}")


def load_unet2d(folder: Path) -> nn.Module:
    """Read a diffusers folder with safetensors into a ``UNet2DModel``.

    Raises EdadmError naming missing, extra and mis-shaped keys, and tensors with NaN or Inf.
    """
    from diffusers import UNet2DModel

    from edadm.tasks.model_folder import load_model

    model = load_model(folder)
    if not isinstance(model, UNet2DModel):
        raise EdadmError(f"{folder} holds a {type(model).__name__}: model.path must be the folder of a UNet2DModel")
    return model


def _folder(folder: Path, parts: tuple[str, ...] = ()) -> str:
    roots = [folder / part for part in parts if (folder / part).exists()] or [folder]
    files = sorted(
        path
        for root in roots
        for path in ([root] if root.is_file() else root.rglob("*"))
        if path.suffix in _OF_A_MODEL or path.name in _OF_A_TOKENIZER
    )
    if not files:
        raise EdadmError(f"no model in {folder}: model.path must be a folder that diffusers can load")
    return content_hash({path.relative_to(folder).as_posix(): _file(path) for path in files})


def _file(path: Path) -> str:
    facts = path.stat()
    return _hash_of_content(path, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=256)
def _hash_of_content(path: Path, size: int, changed: int) -> str:
    """Hash a file once in a process, as long as its size and time of change stay; weights must be whole."""
    if path.suffix in WEIGHTS:
        from edadm.tasks.checkpoint_file import require_whole

        require_whole(path)
    return file_sha256(path)

"""What the rest of edadm needs to know of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edadm.errors import EdadmError
from edadm.store import content_hash, file_sha256

if TYPE_CHECKING:
    import torch
    from torch import nn

    from edadm.sampling.guidance import Conditions


@dataclass(frozen=True)
class Task:
    """A denoiser, the shape of its samples and what full precision is expected to score.

    weights: the folder of the denoiser. load: reads that folder into a float32 module.
    expected_band: metric -> (lowest, highest) value of the full-precision model in the profile ``reference``.
    prediction_type: as diffusers' schedulers name it. learned_variance: the output holds the variance beside the noise.
    conditions: makes what the images are of, at no cost until rows are asked for; None for an unconditional model.
    guided_channels: see `edadm.sampling.guidance.Guidance`.
    """

    name: str
    weights: Path
    sample_shape: tuple[int, int, int]
    load: Callable[[Path], nn.Module]
    expected_band: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    prediction_type: str = "epsilon"
    learned_variance: bool = False
    conditions: Callable[[], Conditions] | None = None
    guided_channels: int | None = None

    def denoiser(self, device: str = "cpu") -> nn.Module:
        """Return the denoiser in float32 and evaluation mode, a new one at each call."""
        return self.load(self.weights).to(device).eval().requires_grad_(False)

    def sha256(self) -> str:
        """Return a hash of the denoiser's files, the identity of the checkpoint in every key."""
        if not self.weights.is_dir():
            raise EdadmError(f"no denoiser in {self.weights}: model.path must be a folder that diffusers can load")
        files = sorted(path for path in self.weights.iterdir() if path.suffix in (".json", ".safetensors"))
        return content_hash({path.name: file_sha256(path) for path in files})


def noise_prediction(network: nn.Module) -> Callable[..., torch.Tensor]:
    """Return the function (x, timestep, condition by name) -> output of a diffusers denoiser, wrapped or not."""

    def denoise(x: torch.Tensor, timestep: torch.Tensor, **condition: torch.Tensor) -> torch.Tensor:
        return network(x, timestep=timestep, **condition, return_dict=False)[0]

    return denoise


def load_unet2d(folder: Path) -> nn.Module:
    """Read a diffusers folder with safetensors into a ``UNet2DModel``.

    Raises EdadmError naming missing, extra and mis-shaped keys, and tensors with NaN or Inf.
    """
    import json

    from diffusers import UNet2DModel
    from safetensors.torch import load_file

    from edadm.tasks.ddim_checkpoint import load_state

    config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    for file in (config, weights):
        if not file.is_file():
            raise EdadmError(f"{file} is missing: model.path must be a folder saved by UNet2DModel.save_pretrained")
    model = UNet2DModel.from_config(json.loads(config.read_text(encoding="utf-8")))
    return load_state(model, load_file(weights), str(weights))

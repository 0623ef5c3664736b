"""Read a whole latent diffusion checkpoint: UNet, first stage, class embedder, noise schedule and scale factor.

Source of the rules: golden README, ldm, 4.5.3, 4.9, 7.2, 8, 9 and 10.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edadm.errors import EdadmError
from edadm.sampling.schedule import exact_alphas_cumprod
from edadm.tasks import compvis_unet, first_stage
from edadm.tasks.architecture import LDM, require
from edadm.tasks.checkpoint_file import read_file, state_dict
from edadm.tasks.compvis_unet import CIN256_V2, LSUN_BEDROOM, LSUN_CHURCH, SD_V1, UNetParams, convert_unet
from edadm.tasks.conversion import refuse
from edadm.tasks.first_stage import KL_F8, VQ_F4, FirstStageParams, convert_first_stage
from edadm.tasks.model_folder import load_model

logger = logging.getLogger(__name__)

_EMA = "model_ema."
_EMA_BOOKKEEPING = {"model_ema.decay", "model_ema.num_updates"}
_CLASS_EMBEDDING = "cond_stage_model.embedding.weight"
_TEXT_ENCODER = "cond_stage_model.transformer.text_model."
_SCHEDULE = {
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
}
_BUFFER_TOLERANCE = 1e-5  # relative, of buffers that are float32 roundings of float64 results


@dataclass(frozen=True)
class LdmParams:
    """What the yaml of a latent diffusion model says.

    linear_start, linear_end: betas linear in the square root. ema: whether its EMA weights are the ones in use.
    scale_factor: of the latents; None where the training measured it and the checkpoint holds it.
    n_classes: rows of the class embedder, the last of which is the null class; None without one.
    """

    unet: UNetParams
    first_stage: FirstStageParams
    linear_start: float
    linear_end: float
    ema: bool
    scale_factor: float | None
    n_classes: int | None = None
    timesteps: int = 1000


LDM_MODELS = {
    "lsun_bedroom_ldm4": LdmParams(LSUN_BEDROOM, VQ_F4, 0.0015, 0.0195, ema=True, scale_factor=1.0),
    "lsun_church_ldm8": LdmParams(LSUN_CHURCH, KL_F8, 0.0015, 0.0155, ema=True, scale_factor=None),
    "imagenet_ldm4": LdmParams(CIN256_V2, VQ_F4, 0.0015, 0.0195, ema=False, scale_factor=1.0, n_classes=1001),
    "sd14": LdmParams(SD_V1, KL_F8, 0.00085, 0.012, ema=False, scale_factor=0.18215),
}


class ClassEmbedder(nn.Module):
    """One context token per class; its last row is the null class of guidance."""

    def __init__(self, n_classes: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_classes, embed_dim)

    @property
    def null_class(self) -> int:
        return self.embedding.num_embeddings - 1

    def forward(self, labels: Tensor) -> Tensor:
        """labels: int64 (B,). Returns (B, 1, embed_dim), the ``encoder_hidden_states`` of the UNet."""
        return self.embedding(labels)[:, None]


@dataclass(frozen=True)
class LatentDiffusion:
    """The parts of a converted model, in float32 and evaluation mode.

    alphas_cumprod: float32 (timesteps,), of the checkpoint. latents are scale_factor times the encoder's output and
    are decoded from latents / scale_factor.
    """

    unet: nn.Module
    first_stage: nn.Module
    alphas_cumprod: Tensor
    scale_factor: float
    class_embedder: ClassEmbedder | None = None


def load_ldm(path: str | Path, params: LdmParams) -> LatentDiffusion:
    """Read an original checkpoint (.ckpt or .safetensors); params: one of LDM_MODELS, or of a model of one's own.

    The text encoder of Stable Diffusion is not among the parts: see `text_encoder_state`.
    Raises EdadmError for an unreadable file, another architecture or model, and missing, unexpected and mis-shaped
    keys.
    """
    file = str(path)
    state = ldm_state(path)
    unet = unet_state(state, params, file)
    alphas_cumprod = noise_schedule(state, params, file)
    factor = scale_factor(state, params, file)
    embedder = None
    if params.n_classes is not None and params.unet.context_dim is not None:
        embedder = class_embedder(state, params.n_classes, params.unet.context_dim, file)
    autoencoder = convert_first_stage(
        _below(state, first_stage.PREFIX), params.first_stage, factor, f"{file} ({first_stage.PREFIX}*)"
    )
    weights = "EMA of " if params.ema else ""
    network = convert_unet(unet, params.unet, f"{file} ({weights}{compvis_unet.PREFIX}*)")
    return LatentDiffusion(network, autoencoder, alphas_cumprod, factor, embedder)


def load_unet(path: str | Path, params: LdmParams) -> nn.Module:
    """Read the UNet alone, of a checkpoint file or of a folder that `save_ldm` wrote; errors as of `load_ldm`."""
    if Path(path).is_dir():
        return load_model(_part(path, "unet"))
    state = ldm_state(path)
    noise_schedule(state, params, str(path))
    return convert_unet(unet_state(state, params, str(path)), params.unet, f"{path} ({compvis_unet.PREFIX}*)")


def load_autoencoder(path: str | Path, params: LdmParams) -> nn.Module:
    """Read the autoencoder alone, the factor of its latents in ``config.scaling_factor``; see `load_unet`."""
    if Path(path).is_dir():
        return load_model(_part(path, "vae"))
    state = ldm_state(path)
    factor = scale_factor(state, params, str(path))
    own = _below(state, first_stage.PREFIX)
    return convert_first_stage(own, params.first_stage, factor, f"{path} ({first_stage.PREFIX}*)")


def load_class_embedding(path: str | Path, params: LdmParams) -> Tensor:
    """Read the class embedding alone, float32 (n_classes, width), its last row the null class; see `load_unet`."""
    if Path(path).is_dir():
        tensors = read_file(_part(path, "ldm.safetensors"))
        if _CLASS_EMBEDDING not in tensors:
            raise EdadmError(
                f"{path} is an unconditional model, it has no {_CLASS_EMBEDDING}: give a class-conditional one, or "
                "choose the task of this model"
            )
        return tensors[_CLASS_EMBEDDING].float()
    assert params.n_classes is not None and params.unet.context_dim is not None
    embedder = class_embedder(ldm_state(path), params.n_classes, params.unet.context_dim, str(path))
    return embedder.embedding.weight.detach()


def _part(folder: str | Path, name: str) -> Path:
    """Return a part of a converted model's folder. Raises EdadmError when it is not there."""
    part = Path(folder) / name
    if not part.exists():
        raise EdadmError(
            f"{folder} has no {name}: give the original checkpoint file, or a folder with unet/, vae/ and "
            "ldm.safetensors that edadm.tasks.ldm_checkpoint.save_ldm wrote"
        )
    return part


def ldm_state(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict of a latent diffusion checkpoint; EdadmError says what another file is."""
    state = state_dict(read_file(path), str(path), section="state_dict")
    require(LDM, state, str(path))
    parts = (compvis_unet.PREFIX, first_stage.PREFIX, _EMA, "cond_stage_model.")
    other = [key for key in state if not key.startswith(parts) and key not in _SCHEDULE | {"scale_factor"}]
    if other:
        logger.warning("%s: %d entries outside of its models are not read: %s", path, len(other), ", ".join(other[:8]))
    return state


def unet_state(state: Mapping[str, Tensor], params: LdmParams, file: str) -> dict[str, Tensor]:
    """Return the UNet's weights without prefix, EMA or raw as params say, after a check that it is this model."""
    raw = _below(state, compvis_unet.PREFIX)
    found = tuple(raw["input_blocks.0.0.weight"].shape)
    asked = (params.unet.model_channels, params.unet.in_channels, 3, 3)
    if found != asked:
        names = {(p.unet.model_channels, p.unet.in_channels, 3, 3): name for name, p in LDM_MODELS.items()}
        which = f"that of {names[found]}" if found in names else "of an unknown model"
        raise EdadmError(f"{file} is another model: its first convolution {found} is {which}, expected {asked}")
    return ema_weights(state, file) if params.ema else raw


def ema_weights(state: Mapping[str, Tensor], file: str) -> dict[str, Tensor]:
    """Return the EMA weights under the names of the raw ones, without prefix.

    EMA names are the raw ones without their dots, which cannot be parsed back, so they are made from the raw names.
    Raises EdadmError naming EMA entries that are missing or left over.
    """
    raw = [key for key in state if key.startswith(compvis_unet.PREFIX)]
    names = {key: _EMA + key.removeprefix("model.").replace(".", "") for key in raw}
    left_over = {key for key in state if key.startswith(_EMA)} - set(names.values()) - _EMA_BOOKKEEPING
    problems = [f"missing {ema}" for ema in names.values() if ema not in state]
    if len(problems) == len(names):
        raise EdadmError(f"{file} has no EMA weights (model_ema.*): give the full checkpoint, or params with ema=False")
    refuse(problems + [f"unexpected {key}" for key in sorted(left_over)], f"{file} has EMA weights of another model")
    return {key.removeprefix(compvis_unet.PREFIX): state[ema] for key, ema in names.items()}


def noise_schedule(state: Mapping[str, Tensor], params: LdmParams, file: str) -> Tensor:
    """Return ``alphas_cumprod``, float32 (timesteps,), as the checkpoint has it, checked against the params.

    A checkpoint of half precision has it too coarsely; it is then computed.
    """
    refuse([f"missing {key}" for key in ("betas", "alphas_cumprod") if key not in state], f"{file} has no schedule")
    stored = state["alphas_cumprod"]
    tolerance = max(_BUFFER_TOLERANCE, 4 * torch.finfo(stored.dtype).eps)
    expected = exact_alphas_cumprod("scaled_linear", params.linear_start, params.linear_end, params.timesteps)
    same = stored.shape == expected.shape and torch.allclose(stored.double(), expected, tolerance, 0.0)
    if not same:
        raise EdadmError(
            f"{file} was trained with another noise schedule than betas from {params.linear_start} to "
            f"{params.linear_end} in {params.timesteps} steps: its last alphas_cumprod is {float(stored[-1]):.4g}, "
            f"expected {float(expected[-1]):.4g}. Is it another model?"
        )
    return stored.clone() if stored.dtype == torch.float32 else expected.float()


def scale_factor(state: Mapping[str, Tensor], params: LdmParams, file: str) -> float:
    """Return the factor of the latents: of the params, else of the checkpoint, where it must then be."""
    if "scale_factor" not in state:
        if params.scale_factor is not None:
            return params.scale_factor
        raise EdadmError(
            f"{file} has no scale_factor, which was measured on the first training batch and stands in no config: "
            "give the checkpoint with all its buffers"
        )
    stored = float(state["scale_factor"])
    if params.scale_factor is not None and abs(stored / params.scale_factor - 1) > _BUFFER_TOLERANCE:
        raise EdadmError(f"{file} has scale_factor {stored}, expected {params.scale_factor}: is it another model?")
    if not 0 < stored < float("inf"):
        raise EdadmError(f"{file} has scale_factor {stored}: it must be positive")
    return stored


def class_embedder(state: Mapping[str, Tensor], n_classes: int, embed_dim: int, file: str) -> ClassEmbedder:
    """Return the class embedder. Raises EdadmError when it is missing or of another shape."""
    expected, weight = (n_classes, embed_dim), state.get(_CLASS_EMBEDDING)
    if weight is None or tuple(weight.shape) != expected:
        found = "missing" if weight is None else f"of shape {tuple(weight.shape)}"
        raise EdadmError(f"{file}: {_CLASS_EMBEDDING} is {found}, expected {expected}")
    return _embedder(weight)


def text_encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of Stable Diffusion's CLIP text encoder, under the names within its text model.

    The position ids that old files carry are left out; they are no weights.
    """
    return {key: t for key, t in _below(state, _TEXT_ENCODER).items() if not key.endswith("position_ids")}


def save_ldm(model: LatentDiffusion, folder: str | Path) -> None:
    """Write ``unet/`` and ``vae/`` as diffusers does, and the schedule and class embedder beside them."""
    from safetensors.torch import save_file

    folder = Path(folder)
    parts: Any = {"unet": model.unet, "vae": model.first_stage}
    for name, module in parts.items():
        module.save_pretrained(folder / name)
    tensors = {"alphas_cumprod": model.alphas_cumprod}
    if model.class_embedder is not None:
        tensors[_CLASS_EMBEDDING] = model.class_embedder.embedding.weight.detach()
    save_file(tensors, folder / "ldm.safetensors")


def load_ldm_folder(folder: str | Path) -> LatentDiffusion:
    """Read what `save_ldm` wrote. Raises EdadmError for files that are missing, broken or of another model."""
    folder = Path(folder)
    tensors = read_file(folder / "ldm.safetensors")
    vae: Any = load_model(folder / "vae")
    weight = tensors.get(_CLASS_EMBEDDING)
    return LatentDiffusion(
        unet=load_model(folder / "unet"),
        first_stage=vae,
        alphas_cumprod=tensors["alphas_cumprod"],
        scale_factor=vae.config.scaling_factor,
        class_embedder=None if weight is None else _embedder(weight),
    )


def _embedder(weight: Tensor) -> ClassEmbedder:
    embedder = ClassEmbedder(*weight.shape)
    embedder.load_state_dict({"embedding.weight": weight.float()})
    return embedder.eval()


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}

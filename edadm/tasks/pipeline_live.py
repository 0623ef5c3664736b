"""A diffusers pipeline in memory as a task: what is calibrated is a copy of its denoiser."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch import nn

from edadm.errors import EdadmError
from edadm.quant import io
from edadm.store import content_hash
from edadm.tasks.base import Task
from edadm.tasks.pipeline import Given, task_of
from edadm.tasks.pipeline_parts import TEXT_ENCODERS, TOKENIZERS, of_pipeline


@dataclass(frozen=True)
class LiveTask(Task):
    """The task of a pipeline in memory: no file holds its denoiser, and it makes no images.

    pipe: the pipeline. component: name of its denoiser.
    """

    pipe: Any = None
    component: str = ""

    @property
    def module(self) -> Any:
        """The pipeline's denoiser itself."""
        return getattr(self.pipe, self.component)

    def denoiser(self, device: str = "cpu") -> nn.Module:
        """Return a copy of the denoiser in evaluation mode, a new one at each call."""
        assert self.own is not None
        return self.own.adapt(copy.deepcopy(self.module).to(device).eval().requires_grad_(False))

    def sha256(self) -> str:
        """Return a hash of the denoiser, of what makes conditions, and of the pipeline's class and own settings."""
        return self._sha256

    @cached_property
    def _sha256(self) -> str:
        changed = {"config": io.config_of(self.module), "patches": io.patches(self.module)}
        facts = {"denoiser": tensors_sha256(self.module), "of": json.loads(json.dumps(changed, default=list))}
        facts["pipeline"] = {"class": type(self.pipe).__name__, **_settings(self.pipe)}
        for name in TEXT_ENCODERS:
            if (encoder := getattr(self.pipe, name, None)) is not None:
                facts[name] = tensors_sha256(encoder)
        for name in TOKENIZERS:
            if (tokenizer := getattr(self.pipe, name, None)) is not None:
                facts[name] = content_hash([sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length])
        return content_hash(facts)


def live(pipe: Any, given: Given) -> LiveTask:
    """Return the task of a pipeline in memory.

    Raises EdadmError for a pipeline that cannot be covered, naming why, and for a denoiser that is not in float32, is
    offloaded, or is quantized already.
    """
    parts = of_pipeline(pipe)
    module = getattr(pipe, parts.denoiser)
    if getattr(module, "is_quantized", False):
        raise EdadmError(
            f"{parts.denoiser} of {parts.place} is quantized already: quantize the pipeline as it was before"
        )
    if module.dtype != torch.float32:
        raise EdadmError(
            f"{parts.denoiser} of {parts.place} is in {module.dtype}, and ranges are set in float32: call "
            "pipe.to(torch.float32) first"
        )
    if hasattr(module, "_hf_hook"):
        raise EdadmError(f"{parts.denoiser} of {parts.place} is offloaded: quantize first, then switch offloading on")
    if any(getattr(block, "s1", None) is not None for block in getattr(module, "up_blocks", ())):
        raise EdadmError(
            f"FreeU is on in {parts.place}, and a quantized denoiser is built without it: call pipe.disable_freeu()"
        )
    task = task_of(parts, given, lambda: pipe)
    same = {field.name: getattr(task, field.name) for field in fields(Task)}
    return LiveTask(**same, pipe=pipe, component=parts.denoiser)


def _settings(pipe: Any) -> dict[str, Any]:
    """Return what the configuration of a pipeline says besides its components, such as how it encodes no prompt."""
    own = {name: value for name, value in pipe.config.items() if name[0] != "_" and name not in pipe.components}
    settings: dict[str, Any] = json.loads(json.dumps(own, default=str))
    return settings


def tensors_sha256(module: nn.Module) -> str:
    """Return a hash of a module's parameters and buffers with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted((dict(module.named_buffers()) | module.state_dict()).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        if math.prod(tensor.shape):
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

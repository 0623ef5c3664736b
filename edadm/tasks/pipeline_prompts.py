"""Prompts as the pipeline's own ``encode_prompt`` makes conditions of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from edadm.errors import EdadmError
from edadm.sampling.guidance import Condition
from edadm.tasks.pipeline_calls import CALLS
from edadm.tasks.pipeline_parts import Parts
from edadm.tasks.text import ENCODED_AT_ONCE, TextConditions


@dataclass(frozen=True, eq=False)
class PipelinePrompts(TextConditions):
    """Prompts, and conditions that all images share.

    encoder: makes the function from texts, and whether they stand for none, to conditions. shared: the conditions that
    are equal for all images, one row each.
    """

    encoder: Callable[[], Any]
    shared: Condition

    @cached_property
    def null(self) -> Condition:
        """The condition that the pipeline takes for no text."""
        return self._of([""], negative=True)

    def rows(self, stream: str, seed: int, numbers: Sequence[int]) -> Condition:
        """Return the conditions of these image numbers."""
        prompts = self.prompts(stream, seed, numbers)
        starts = range(0, len(prompts), ENCODED_AT_ONCE)
        parts = [self._of(prompts[start : start + ENCODED_AT_ONCE]) for start in starts]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _of(self, texts: Sequence[str], negative: bool = False) -> Condition:
        encode: Any = self.encode
        shared = {name: row.expand(len(texts), *row.shape[1:]) for name, row in self.shared.items()}
        return {**encode(texts, negative), **shared}

    def identity(self, stream: str) -> dict[str, Any]:
        """Return the class, the prompts of a stream and what all rows share; the text encoders are the checkpoint's."""
        shared = {name: row.flatten().tolist() for name, row in self.shared.items()}
        return super().identity(stream) | ({"shared": shared} if shared else {})


@torch.no_grad()
def encode(pipe: Any, parts: Parts, texts: Sequence[str], negative: bool = False) -> Condition:
    """Encode texts, or (negative) what stands for none, as a call of the pipeline does; float32 rows on the CPU.

    Raises EdadmError for a pipeline whose ``encode_prompt`` is unlike what is known for its denoiser.
    """
    if not hasattr(pipe, "encode_prompt"):
        raise EdadmError(f"{parts.place} has no encode_prompt: pipelines of other conditions cannot be calibrated here")
    taken = inspect.signature(pipe.encode_prompt).parameters
    named: dict[str, Any] = {name: None for name in ("prompt_2", "prompt_3") if name in taken}  # as the first
    for name in ("max_sequence_length", "clean_caption"):
        if name in taken:
            named[name] = parts.default(name, taken[name].default)
    if "do_classifier_free_guidance" in taken:
        named["do_classifier_free_guidance"] = negative
    found = pipe.encode_prompt(prompt=list(texts), device=pipe.device, num_images_per_prompt=1, **named)
    places = CALLS[parts.denoiser_class].texts.get(len(found))
    if places is None:
        raise EdadmError(
            f"{parts.place}: its encode_prompt returns {len(found)} values, unlike what is known for a "
            f"{parts.denoiser_class}"
        )
    rows = {name: found[none if negative and none is not None else given] for name, (given, none) in places.items()}
    return {name: row.cpu() if name.endswith("mask") else row.cpu().float() for name, row in rows.items()}

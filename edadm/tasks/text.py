"""Prompts as conditions: which prompt each image has, and the text encoder that the network is given it by.

Prompts come from a file. Those that calibrate come from a file of their own or are the last tenth of the first one, so
that no prompt is both calibrated with and evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edadm.errors import EdadmError
from edadm.prompts import read_captions
from edadm.sampling.guidance import Condition
from edadm.sampling.noise import CALIBRATION, numpy_rng
from edadm.store import content_hash
from edadm.tasks.conversion import refuse
from edadm.tasks.weights import refuse_variants

HELD_OUT = 10  # one prompt in so many calibrates where there is no file of its own
ENCODED_AT_ONCE = 32
SHUFFLE_SEED = 1234  # of captions, which a file groups by nothing that matters
EXTRA = "text"
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("spiece.model",), ("vocab.txt",))


class Encode(Protocol):
    """From texts to the hidden states float32 (len(texts), tokens, width) that the network attends to."""

    def __call__(self, texts: Sequence[str]) -> Tensor: ...


def split_prompts(path: str, calibration_path: str | None) -> tuple[list[str], list[str]]:
    """Return the prompts of the evaluated images in their order, and those that calibrate.

    Captions (.json) are shuffled; the lines of a text file keep their order, also those that are there twice. Raises
    EdadmError for files that `edadm.prompts.read_captions` refuses, and where no calibration prompt is left that is not
    evaluated.
    """
    prompts = read_captions(path)
    if Path(path).suffix == ".json":
        prompts = [prompts[index] for index in numpy_rng("prompts", SHUFFLE_SEED).permutation(len(prompts))]
    if calibration_path is None:
        kept = len(prompts) - max(1, len(prompts) // HELD_OUT)
        if not kept:
            raise EdadmError(f"{path} has one prompt, which cannot calibrate and be evaluated: give more")
        calibration = _others(prompts[kept:], prompts[:kept])
        if not calibration:
            raise EdadmError(
                f"every prompt of the last tenth of {path} is there before, too: set dataset.calibration_prompts to a "
                "file with others"
            )
        return prompts[:kept], calibration
    calibration = _others(read_captions(calibration_path), prompts)
    if not calibration:
        raise EdadmError(
            f"every prompt of dataset.calibration_prompts={calibration_path} is in dataset.prompts={path}: give others"
        )
    return prompts, calibration


def _others(prompts: Sequence[str], evaluated: Sequence[str]) -> list[str]:
    """Return the prompts that are not evaluated, each once."""
    taken = set(evaluated)
    return [prompt for prompt in dict.fromkeys(prompts) if prompt not in taken]


@dataclass(frozen=True, eq=False)
class TextConditions:
    """Prompts, image i the prompt number i and from the start again; calibration in an order of its own by seed.

    encoder: reads the text encoder when the first prompt is encoded. The null condition is the empty prompt.
    """

    evaluated: Sequence[str]
    calibration: Sequence[str]
    encoder: Callable[[], Encode]

    @cached_property
    def encode(self) -> Encode:
        """The text encoder."""
        return self.encoder()

    @cached_property
    def null(self) -> Condition:
        """The condition of the empty prompt."""
        return {"encoder_hidden_states": self.encode([""])}

    def rows(self, stream: str, seed: int, numbers: Sequence[int]) -> Condition:
        """Return the conditions of these image numbers."""
        prompts = self.prompts(stream, seed, numbers)
        parts = [prompts[start : start + ENCODED_AT_ONCE] for start in range(0, len(prompts), ENCODED_AT_ONCE)]
        return {"encoder_hidden_states": torch.cat([self.encode(part) for part in parts])}

    def prompts(self, stream: str, seed: int, numbers: Sequence[int]) -> list[str]:
        """Return the prompts of these image numbers."""
        if stream != CALIBRATION:
            return [self.evaluated[number % len(self.evaluated)] for number in numbers]
        order = numpy_rng(f"{stream}/prompts", seed).permutation(len(self.calibration))
        return [self.calibration[order[number % len(order)]] for number in numbers]

    def identity(self, stream: str) -> dict[str, Any]:
        """Return the class and the prompts of a stream; the text encoder belongs to the checkpoint."""
        texts = self.calibration if stream == CALIBRATION else self.evaluated
        return {"part": type(self).__name__, "version": 1, "prompts": content_hash(list(texts))}


# CLIP ViT-L/14's text model, the encoder of Stable Diffusion v1
CLIP_VIT_L_14 = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}


def encoder_of_folder(folder: Path) -> Encode:
    """Read ``text_encoder/`` and ``tokenizer/`` of a pipeline's folder.

    Raises EdadmError when they are not there or broken, and naming the extra where transformers is not installed.
    """
    transformers = _transformers()
    for part in ("text_encoder", "tokenizer"):
        if not (folder / part).is_dir():
            raise EdadmError(f"{folder} has no {part}: give the folder of a whole Stable Diffusion pipeline")
    require_vocabulary(folder / "tokenizer")
    model = load_encoder(folder / "text_encoder", "CLIPTextModel")
    try:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except Exception as error:  # the readers of vocabularies raise types of their own
        raise _unreadable(folder / "tokenizer", error) from error
    if len(tokenizer) > model.config.vocab_size:
        raise EdadmError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, its text encoder {model.config.vocab_size}: they "
            "are of different models"
        )

    def tokens(texts: Sequence[str]) -> Tensor:
        length = model.config.max_position_embeddings
        found = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return found.input_ids

    return _encode(model, tokens)


def load_encoder(folder: Path, class_name: str) -> Any:
    """Read a text encoder of transformers in float32 from its own folder.

    Raises EdadmError when it is not there or broken, and naming what the class has and the files lack, which
    transformers would fill with random numbers.
    """
    transformers = _transformers()
    if not folder.is_dir():
        raise EdadmError(f"{folder} is missing: give the folder of a whole pipeline")
    refuse_variants(folder)
    try:
        model, found = getattr(transformers, class_name).from_pretrained(
            folder, local_files_only=True, torch_dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # the readers of configurations and tensors raise types of their own
        raise _unreadable(folder, error) from error
    absent = sorted(str(key) for what in ("missing_keys", "mismatched_keys") for key in found[what])
    refuse([f"missing {key}" for key in absent], f"{folder} does not fit {class_name}")
    return model


def require_vocabulary(folder: Path) -> None:
    """Raise EdadmError for a folder of a tokenizer without vocabulary, which transformers reads as an empty one."""
    if not any(all((folder / name).is_file() for name in files) for files in _VOCABULARIES):
        raise EdadmError(
            f"{folder} has no vocabulary ({', or '.join(' and '.join(files) for files in _VOCABULARIES)}): fetch the "
            "folder again"
        )


def _unreadable(folder: Path, error: Exception) -> EdadmError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return EdadmError(f"{folder} cannot be read ({reason}): it is truncated or of another kind, fetch it again")


def encoder_of_state(state: Mapping[str, Tensor], file: str, config: Mapping[str, Any] = CLIP_VIT_L_14) -> Encode:
    """Build the text encoder of an original checkpoint from its tensors, named as within CLIP's text model.

    Its tokenizer is open_clip's, whose vocabulary is the same; it is padded with the end-of-text token as Stable
    Diffusion's is. Raises EdadmError naming missing, unexpected and mis-shaped keys, and the extra that is missing.
    """
    transformers = _transformers()
    from edadm.tasks.ddim_checkpoint import load_state

    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
    level = "text_model." if any(key.startswith("text_model.") for key in model.state_dict()) else ""
    buffers = {key: tensor for key, tensor in model.state_dict().items() if key.endswith("position_ids")}
    load_state(model, {f"{level}{key}": tensor for key, tensor in state.items()} | buffers, f"{file} (text encoder)")
    end, length = int(config["eos_token_id"]), int(config["max_position_embeddings"])

    def tokens(texts: Sequence[str]) -> Tensor:
        import open_clip

        found = open_clip.get_tokenizer("ViT-L-14")(list(texts), context_length=length)
        first_end = found.argmax(dim=1, keepdim=True)  # the end-of-text token is the largest
        return found.where(torch.arange(length) <= first_end, end)

    return _encode(model, tokens)


def _encode(model: nn.Module, tokens: Callable[[Sequence[str]], Tensor]) -> Encode:
    model.eval().requires_grad_(False)

    @torch.no_grad()
    def encode(texts: Sequence[str]) -> Tensor:
        return model(input_ids=tokens(texts)).last_hidden_state.float()

    return encode


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise EdadmError(f"text-to-image tasks need the package transformers: pip install 'edadm[{EXTRA}]'") from error
    return transformers

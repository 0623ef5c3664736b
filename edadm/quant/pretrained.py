"""A quantized denoiser as diffusers has it: in a pipeline, in a folder of ``save_pretrained``, read by its loader.

diffusers' quantization interface loads what is quantized already; quantizing while loading does not fit, since it gives
a method the weights and nothing to calibrate on.
"""

from __future__ import annotations

import importlib.util
import json
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edadm.errors import EdadmError
from edadm.quant import io
from edadm.quant.network import QuantModel
from edadm.quant.quantizer import ActivationQuantizer

_CASTS = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64, "float": torch.float32}


class _Method(StrEnum):  # diffusers asks for a string, and for the value of an Enum
    EDADM = io.METHOD


def as_denoiser(network: QuantModel, **facts: Any) -> nn.Module:
    """Return the denoiser of a quantized network as a module of diffusers: same class, configuration and call.

    Its ``save_pretrained`` writes codes and scales. It refuses another type than float32, in which the steps of its
    quantizers would be others: sample under ``torch.autocast``. facts: what its description says besides, as JSON.
    """
    config_class, quantizer_class = register()
    quantizer = quantizer_class(config_class(**io.quantization_of(network, **facts)))
    _attach(network, quantizer)
    return network.model


@cache
def register() -> tuple[type, type]:
    """Make ``from_pretrained`` of diffusers' models and pipelines load what we saved; it needs accelerate for that.

    Returns the classes of the quantization's configuration and of its loader.
    """
    from diffusers.quantizers import auto, base, quantization_config

    class EdadmConfig(quantization_config.QuantizationConfigMixin):
        """The field ``quantization_config`` of a quantized denoiser's config.json: see `edadm.quant.io`."""

        def __init__(self, **description: Any) -> None:
            self.__dict__.update(description, quant_method=_Method.EDADM)

        def to_diff_dict(self) -> dict[str, Any]:
            return self.to_dict()

    class EdadmQuantizer(base.DiffusersQuantizer):
        """The loader of a saved quantized denoiser within diffusers' ``from_pretrained``."""

        requires_calibration = True

        def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
            if not kwargs.get("pre_quantized", True):
                raise EdadmError(
                    "from_pretrained cannot quantize with edadm, which needs calibration: load the pipeline as it is "
                    "and call edadm.quantize"
                )
            super().__init__(quantization_config, **kwargs)
            self._network: QuantModel | None = None
            self._stored: dict[str, Tensor] = {}
            self._installed = False

        def validate_environment(self, *args: Any, **kwargs: Any) -> None:
            if importlib.util.find_spec("accelerate") is None:
                raise EdadmError(
                    "from_pretrained of diffusers loads quantized models with the package accelerate, which is not "
                    "here: pip install accelerate, or use edadm.load_pipeline, which does without"
                )

        def update_torch_dtype(self, torch_dtype: Any) -> Any:
            if torch_dtype not in (None, torch.float32):
                raise EdadmError(
                    f"a quantized denoiser is loaded in float32, not {torch_dtype}, in which its quantization steps "
                    "would be others: leave torch_dtype out, and sample under torch.autocast"
                )
            return torch_dtype

        def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
            return []  # ours differ from the module's: what is missing is said after loading

        def check_if_quantized_param(
            self, model: Any, param_value: Any, param_name: str, state_dict: dict[str, Any], **kwargs: Any
        ) -> bool:
            return True

        def create_quantized_param(self, *args: Any, **kwargs: Any) -> Any:
            """Take everything that a file holds at its first tensor, and install it when the last file was seen."""
            _, _, _, device, state_dict, *unexpected = args
            if unexpected and unexpected[0]:
                unexpected[0].clear()  # ours differ from the module's
            if self._network is None or self._installed:
                return
            self._stored |= state_dict
            if not io.missing(self._network, self._stored):
                _materialise(self._network, device)
                io.install(self._network, self._stored, "the folder of the quantized denoiser")
                self._stored, self._installed = {}, True

        def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
            self._network = io.wrap(model, self.quantization_config.to_dict())

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
            assert self._network is not None
            if not self._installed:
                absent = io.missing(self._network, self._stored)
                raise EdadmError(f"the folder of the quantized denoiser lacks {', '.join(absent[:6])}: save it again")
            _attach(self._network, self)

        @property
        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return False

    auto.AUTO_QUANTIZER_MAPPING[io.METHOD] = EdadmQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[io.METHOD] = EdadmConfig
    return EdadmConfig, EdadmQuantizer


def _attach(network: QuantModel, quantizer: Any) -> None:
    """Make a denoiser save itself as ours, and tell diffusers that it is quantized."""
    model: Any = network.model
    model.is_quantized, model.quantization_method, model.hf_quantizer = True, _Method.EDADM, quantizer
    model.register_to_config(**{io.QUANTIZATION: quantizer.quantization_config})
    model.save_pretrained, model.to = partial(_save_pretrained, network), partial(_to, network)
    for name, dtype in _CASTS.items():
        setattr(model, name, partial(_to, network, dtype))
    for layer in network.layers.values():  # pipelines ask some layers for their sizes
        kind = "features" if layer.weight.dim() == 2 else "channels"
        for name, size in zip((f"out_{kind}", f"in_{kind}"), layer.weight.shape):
            setattr(layer, name, size)


def _to(network: QuantModel, *args: Any, **kwargs: Any) -> nn.Module:
    """Move a quantized denoiser to a device. Raises EdadmError for another type than float32."""
    model: Any = network.model
    types = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)]
    if others := [dtype for dtype in types if dtype is not torch.float32]:
        raise EdadmError(
            f"a quantized denoiser stays in float32, in {others[0]} its quantization steps would be others: sample "
            "under torch.autocast"
        )
    places = [value for value in args if value is not None and value not in types]
    named = {name: value for name, value in kwargs.items() if value is not None and value not in types}
    return type(model).to(model, *places, **named) if places or named else model


def _materialise(network: QuantModel, device: Any) -> None:
    """Give a network on the meta device storage; its quantizers start without ranges."""
    network.to_empty(device="cpu" if device is None else device)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, ActivationQuantizer):
                module.scale.fill_(1)
                module.zero_point.fill_(0)


def _save_pretrained(
    network: QuantModel,
    save_directory: str | Path,
    is_main_process: bool = True,
    safe_serialization: bool = True,
    variant: str | None = None,
    **kwargs: Any,
) -> None:
    """Write a quantized denoiser as a folder of diffusers, in place of its own ``save_pretrained``.

    Raises EdadmError for pickled weights, for a variant, and for a folder whose index would name other weights.
    """
    from safetensors.torch import save_file

    if not safe_serialization or variant is not None:
        raise EdadmError("a quantized denoiser is saved as safetensors, and has no variants: leave both options out")
    folder = Path(save_directory)
    index = folder / f"{io.PRETRAINED_WEIGHTS}.index.json"
    if index.exists():
        raise EdadmError(f"{index} belongs to other weights: save to another folder")
    if not is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = network.model
    model.save_config(folder)
    stored = {key.removeprefix(io.FLOAT): tensor for key, tensor in io.tensors(network).items()}
    save_file(stored, folder / io.PRETRAINED_WEIGHTS, metadata={"format": "pt"})


def quantized_component(folder: Path) -> str | None:
    """Return the name of the component of a saved pipeline that is a quantized denoiser of ours, None without one.

    Raises EdadmError for a configuration that cannot be read.
    """
    for file in sorted(folder.glob(f"*/{io.PRETRAINED_CONFIG}")):
        try:
            quantization = json.loads(file.read_text(encoding="utf-8")).get(io.QUANTIZATION) or {}
        except (ValueError, AttributeError) as error:
            raise EdadmError(f"{file} cannot be read as JSON ({error}): save or fetch the pipeline again") from error
        if quantization.get("quant_method") == io.METHOD:
            return file.parent.name
    return None

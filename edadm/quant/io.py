"""Save a quantized network as integer codes and scales, and load it back with equal outputs."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from edadm.errors import EdadmError
from edadm.quant.network import Bits, QuantModel, SitePlan
from edadm.quant.quantizer import is_float

FORMAT = 1
NOTE = "fake-quantized: the codes are integers, every operation runs in floating point"
WEIGHTS, DESCRIPTION = "quantized.safetensors", "quantized.json"
# The same in the layout of diffusers (edadm.quant.pretrained): the description is a field of the configuration, and
# tensors that stay in floating point have the names of the module without FLOAT before them.
PRETRAINED_WEIGHTS, PRETRAINED_CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
QUANTIZATION, METHOD = "quantization_config", "edadm"
FLOAT = "float."
# What converters of original checkpoints set on modules, where no configuration has room for it (golden/ldm README).
PATCHED = ("heads", "scale", "downscale_freq_shift")
NOT_STOCK = ("_", "edadm_")  # fields of a configuration that diffusers adds, or a converter, for what it patches

logger = logging.getLogger(__name__)


def save(network: QuantModel, folder: str | Path, **facts: Any) -> Path:
    """Write ``quantized.safetensors`` (codes, scales, zero points, float parts) and ``quantized.json`` into folder.

    facts: anything JSON can hold that the description should carry (task, method, hash of the run).
    Raises EdadmError for a network in another precision than float32, whose codes would not be exact.
    """
    from safetensors.torch import save_file

    stored = tensors(network)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(stored, folder / WEIGHTS)
    description = {"model_class": type(network.model).__name__, "model_config": config_of(network.model)}
    description |= quantization_of(network, **facts)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1, sort_keys=True, default=list) + "\n")
    return folder


def load(folder: str | Path) -> QuantModel:
    """Load a folder written by ``save``, or by ``save_pretrained`` of a quantized denoiser in a diffusers pipeline.

    Outputs equal those of the saved network to the bit on the same machine.
    Raises EdadmError when a file is missing, broken, of another format or does not fit the network.
    """
    import diffusers
    from safetensors.torch import load_file

    folder = Path(folder)
    description = read_description(folder)
    try:
        stored = load_file(files(folder)[1])
    except Exception as error:
        raise _unreadable(folder, error) from error
    with torch.device("meta"):  # every tensor is in the file, so none is drawn at random first
        model = getattr(diffusers, description["model_class"]).from_config(description["model_config"])
    network = wrap(model.to_empty(device="cpu"), description)
    install(network, stored, str(folder))
    logger.info("loaded a fake-quantized model from %s: integer codes, floating-point arithmetic", folder)
    return network


def files(folder: str | Path) -> tuple[Path, Path]:
    """Return the description and the weights that `load` reads from a folder; they need not be there."""
    folder = Path(folder)
    if (folder / DESCRIPTION).exists() or not (folder / PRETRAINED_CONFIG).exists():
        return folder / DESCRIPTION, folder / WEIGHTS
    return folder / PRETRAINED_CONFIG, folder / PRETRAINED_WEIGHTS


def read_description(folder: str | Path) -> dict[str, Any]:
    """Return what a folder says of its quantized network: class, configuration, bits, plan and facts.

    Raises EdadmError when no quantized network is there, or one of another format.
    """
    folder = Path(folder)
    try:
        file = files(folder)[0]
        description = json.loads(file.read_text(encoding="utf-8"))
        if file.name == PRETRAINED_CONFIG:
            config = description
            quantization = config.get(QUANTIZATION) or {}
            if quantization.get("quant_method") != METHOD:
                raise ValueError(f"{PRETRAINED_CONFIG} has no {QUANTIZATION} of ours")
            description = {"model_class": config["_class_name"], "model_config": _public(config), **quantization}
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable(folder, error) from error
    if description.get("format") != FORMAT:
        raise EdadmError(f"{folder} has format {description.get('format')}, this version reads {FORMAT}: save it again")
    return description


def _unreadable(folder: Path, error: Exception) -> EdadmError:
    return EdadmError(
        f"no readable quantized model in {folder} ({error}): expected {WEIGHTS} and {DESCRIPTION}, or the folder of a "
        "quantized denoiser in a saved pipeline"
    )


def quantization_of(network: QuantModel, **facts: Any) -> dict[str, Any]:
    """Return what the configuration of a denoiser does not say of its quantized network, as JSON-like data."""
    changed = patches(network.model)
    return {
        "format": FORMAT,
        "note": NOTE,
        "bits": asdict(network.bits),
        "plan": {
            "edge": {role: dict(rule) for role, rule in network.plan.edge.items()},
            "split": network.plan.split,
            "matmuls": network.plan.matmuls,
        },
        **({"patches": changed} if changed else {}),
        **facts,
    }


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return the configuration of a diffusers module with nothing of its quantization."""
    return _public(dict(cast(Mapping, model.config)))


def _public(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith(NOT_STOCK) and key != QUANTIZATION}


def wrap(model: nn.Module, description: Mapping[str, Any]) -> QuantModel:
    """Wrap a diffusers module as a description says; its quantizers have no ranges yet."""
    for path, value in description.get("patches", {}).items():
        name, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(name), attribute, value)
    plan = description["plan"]
    return QuantModel.wrap(model, Bits(**description["bits"]), SitePlan(plan["edge"], plan["split"], plan["matmuls"]))


def _quantized_layers(network: QuantModel):
    return [layer for layer in network.layers.values() if not is_float(layer.bits.weight)]


def patches(model: nn.Module) -> dict[str, int | float]:
    """Return, as ``module.attribute``, the attributes of PATCHED that differ from those the configuration gives."""
    import diffusers

    with torch.device("meta"):
        plain = getattr(diffusers, type(model).__name__).from_config(config_of(model))
    attributes = [(name, module, attribute) for name, module in plain.named_modules() for attribute in PATCHED]
    return {
        f"{name}.{attribute}": getattr(model.get_submodule(name), attribute)
        for name, module, attribute in attributes
        if hasattr(module, attribute) and getattr(model.get_submodule(name), attribute) != getattr(module, attribute)
    }


def _float_tensors(network: QuantModel) -> dict[str, torch.Tensor]:
    """Return what is stored in floating point: all but quantizers and the weights that are stored as codes.

    Buffers that diffusers computes anew (positions) are among them, since a converter may have replaced them.
    """
    codes_of = {f"{layer.name}.weight" for layer in _quantized_layers(network)}
    state = network.model.state_dict() | dict(network.model.named_buffers())
    kept = (key for key in state if key not in codes_of and "quantizer" not in key and ".matmul." not in key)
    return {f"{FLOAT}{key}": state[key] for key in kept}


def tensors(network: QuantModel) -> dict[str, torch.Tensor]:
    """Return what makes up a quantized network: codes, scales, zero points and all that stays in floating point.

    Raises EdadmError for a network in another precision than float32, whose codes would not be exact.
    """
    for layer in network.layers.values():
        if layer.weight.dtype != torch.float32:
            raise EdadmError(f"{layer.name} is in {layer.weight.dtype}: save the network in float32, then convert it")
    found = _float_tensors(network)
    for layer in _quantized_layers(network):
        for quantizer, codes in zip(layer.weight_quantizers, layer.weight_codes()):
            found[f"{quantizer.name}.codes"] = codes
            found[f"{quantizer.name}.scale"] = quantizer.scale
            found[f"{quantizer.name}.zero_point"] = quantizer.zero_point
    for quantizer in network.activation_quantizers:
        found[f"{quantizer.name}.scale"] = quantizer.scale.detach()
        found[f"{quantizer.name}.zero_point"] = quantizer.zero_point
    return {key: tensor.contiguous() for key, tensor in found.items()}


def missing(network: QuantModel, stored: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of `tensors` of a network that are not among those stored, in either layout."""
    named = _with_float(network, stored)
    return [key for key in _expected_keys(network) if key not in named]


@torch.no_grad()
def install(network: QuantModel, stored: Mapping[str, torch.Tensor], source: str) -> None:
    """Give a wrapped network the tensors of a saved one, in either layout, and switch its quantizers on.

    Raises EdadmError naming the keys when they are not those of the network.
    """
    named = _with_float(network, stored)
    expected = set(_expected_keys(network))
    if expected != named.keys():
        wrong = sorted(expected ^ named.keys())
        raise EdadmError(f"{source} does not fit its own description, differing keys: {', '.join(wrong[:6])}")
    state = {key.removeprefix(FLOAT): value for key, value in named.items() if key.startswith(FLOAT)}
    network.model.load_state_dict(state, strict=False)
    for key, buffer in network.model.named_buffers():
        if key in state:
            buffer.copy_(state[key])
    for layer in _quantized_layers(network):
        for quantizer in layer.weight_quantizers:
            quantizer.set(named[f"{quantizer.name}.scale"], named[f"{quantizer.name}.zero_point"])
        layer.set_weight_codes([named[f"{quantizer.name}.codes"] for quantizer in layer.weight_quantizers])
    for quantizer in network.activation_quantizers:
        quantizer.set(named[f"{quantizer.name}.scale"], named[f"{quantizer.name}.zero_point"])
    network.set_state(weights=True, activations=True)


def _with_float(network: QuantModel, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return stored tensors by the names of `tensors`."""
    expected = set(_expected_keys(network))
    return {key if key in expected else f"{FLOAT}{key}": tensor for key, tensor in stored.items()}


def _expected_keys(network: QuantModel):
    yield from _float_tensors(network)
    for layer in _quantized_layers(network):
        for quantizer in layer.weight_quantizers:
            yield from (f"{quantizer.name}.codes", f"{quantizer.name}.scale", f"{quantizer.name}.zero_point")
    for quantizer in network.activation_quantizers:
        yield from (f"{quantizer.name}.scale", f"{quantizer.name}.zero_point")

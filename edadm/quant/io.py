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
WEIGHTS, DESCRIPTION = "quantized.safetensors", "quantized.json"
# What converters of original checkpoints set on modules, where no configuration has room for it (golden/ldm README).
PATCHED = ("heads", "scale", "downscale_freq_shift")

logger = logging.getLogger(__name__)


def save(network: QuantModel, folder: str | Path, **facts: Any) -> Path:
    """Write ``quantized.safetensors`` (codes, scales, zero points, float parts) and ``quantized.json`` into folder.

    facts: anything JSON can hold that the description should carry (task, method, hash of the run).
    Raises EdadmError for a network in another precision than float32, whose codes would not be exact.
    """
    from safetensors.torch import save_file

    for layer in network.layers.values():
        if layer.weight.dtype != torch.float32:
            raise EdadmError(f"{layer.name} is in {layer.weight.dtype}: save the network in float32, then convert it")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in _tensors(network).items()}, folder / WEIGHTS)
    config = {key: value for key, value in dict(cast(Mapping, network.model.config)).items() if not key.startswith("_")}
    patches = _patches(network.model, config)
    description = {
        "format": FORMAT,
        "note": "fake-quantized: the codes are integers, every operation runs in floating point",
        "model_class": type(network.model).__name__,
        "model_config": config,
        "bits": asdict(network.bits),
        "plan": {
            "edge": {role: dict(rule) for role, rule in network.plan.edge.items()},
            "split": network.plan.split,
            "matmuls": network.plan.matmuls,
        },
        **({"patches": patches} if patches else {}),
        **facts,
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=1, sort_keys=True, default=list) + "\n")
    return folder


def load(folder: str | Path) -> QuantModel:
    """Load a folder written by ``save``; outputs equal those of the saved network to the bit on the same machine.

    Raises EdadmError when a file is missing, broken, of another format or does not fit the network.
    """
    import diffusers
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        tensors = load_file(folder / WEIGHTS)
    except Exception as error:
        raise EdadmError(
            f"no readable quantized model in {folder} ({error}): expected {WEIGHTS} and {DESCRIPTION}"
        ) from error
    if description.get("format") != FORMAT:
        raise EdadmError(f"{folder} has format {description.get('format')}, this version reads {FORMAT}: save it again")
    model = getattr(diffusers, description["model_class"]).from_config(description["model_config"])
    for path, value in description.get("patches", {}).items():
        name, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(name), attribute, value)
    plan = description["plan"]
    network = QuantModel.wrap(
        model, Bits(**description["bits"]), SitePlan(plan["edge"], plan["split"], plan["matmuls"])
    )
    _install(network, tensors, str(folder))
    network.set_state(weights=True, activations=True)
    logger.info("loaded a fake-quantized model from %s: integer codes, floating-point arithmetic", folder)
    return network


def _quantized_layers(network: QuantModel):
    return [layer for layer in network.layers.values() if not is_float(layer.bits.weight)]


def _patches(model: nn.Module, config: Mapping[str, Any]) -> dict[str, int | float]:
    """Return, as ``module.attribute``, the attributes of PATCHED that differ from those the configuration gives."""
    import diffusers

    with torch.device("meta"):
        plain = getattr(diffusers, type(model).__name__).from_config(config)
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
    return {f"float.{key}": state[key] for key in kept}


def _tensors(network: QuantModel) -> dict[str, torch.Tensor]:
    tensors = _float_tensors(network)
    for layer in _quantized_layers(network):
        for quantizer, codes in zip(layer.weight_quantizers, layer.weight_codes()):
            tensors[f"{quantizer.name}.codes"] = codes
            tensors[f"{quantizer.name}.scale"] = quantizer.scale
            tensors[f"{quantizer.name}.zero_point"] = quantizer.zero_point
    for quantizer in network.activation_quantizers:
        tensors[f"{quantizer.name}.scale"] = quantizer.scale.detach()
        tensors[f"{quantizer.name}.zero_point"] = quantizer.zero_point
    return tensors


@torch.no_grad()
def _install(network: QuantModel, tensors: dict[str, torch.Tensor], source: str) -> None:
    expected = set(_expected_keys(network))
    if expected != tensors.keys():
        wrong = sorted(expected ^ tensors.keys())
        raise EdadmError(f"{source} does not fit its own description, differing keys: {', '.join(wrong[:6])}")
    state = {key.removeprefix("float."): value for key, value in tensors.items() if key.startswith("float.")}
    network.model.load_state_dict(state, strict=False)
    for key, buffer in network.model.named_buffers():
        if key in state:
            buffer.copy_(state[key])
    for layer in _quantized_layers(network):
        for quantizer in layer.weight_quantizers:
            quantizer.set(tensors[f"{quantizer.name}.scale"], tensors[f"{quantizer.name}.zero_point"])
        layer.set_weight_codes([tensors[f"{quantizer.name}.codes"] for quantizer in layer.weight_quantizers])
    for quantizer in network.activation_quantizers:
        quantizer.set(tensors[f"{quantizer.name}.scale"], tensors[f"{quantizer.name}.zero_point"])


def _expected_keys(network: QuantModel):
    yield from _float_tensors(network)
    for layer in _quantized_layers(network):
        for quantizer in layer.weight_quantizers:
            yield from (f"{quantizer.name}.codes", f"{quantizer.name}.scale", f"{quantizer.name}.zero_point")
    for quantizer in network.activation_quantizers:
        yield from (f"{quantizer.name}.scale", f"{quantizer.name}.zero_point")

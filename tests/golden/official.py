"""Names of the official module tree, translated to our quantizers."""

from __future__ import annotations

import re

from torch import nn

from edadm.quant.layers import AttentionMatmul, QuantLayer
from edadm.quant.network import QuantModel


def block_module(official: str, official_names: dict[str, str]) -> str:
    """The diffusers module of an official layer or block."""
    if official in official_names:
        return official_names[official]
    child = next(name for name in official_names if name.startswith(official + "."))
    depth = 2 if ".to_out." in official_names[child] else 1
    return official_names[child].rsplit(".", depth)[0]


def quantizers_of(network: QuantModel, official_names: dict[str, str], block: str = "") -> dict[str, nn.Module]:
    """Official quantizer name, relative to ``block``, -> our quantizer, for the whole network or one block."""
    prefix = f"{block}." if block else ""
    result: dict[str, nn.Module] = {}
    for official, name in official_names.items():
        layer = network.layers.get(name)
        if layer is None or not (official == block or official.startswith(prefix)):
            continue
        relative = official.removeprefix(prefix) if official != block else ""
        result |= layer_quantizers(layer, f"{relative}." if relative else "")
        if official.endswith(".q"):
            matmul = network.matmuls[re.sub(r"\.to_q$", ".matmul", name)]
            result |= matmul_quantizers(matmul, relative.removesuffix("q"))
    return result


def layer_quantizers(layer: QuantLayer, prefix: str = "") -> dict[str, nn.Module]:
    parts = {}
    for suffix, weight, act in zip(("", "_0"), layer.weight_quantizers, layer.act_quantizers):
        parts[f"{prefix}weight_quantizer{suffix}"] = weight
        parts[f"{prefix}act_quantizer{suffix}"] = act
    return parts


def matmul_quantizers(matmul: AttentionMatmul, prefix: str = "") -> dict[str, nn.Module]:
    return {f"{prefix}act_quantizer_{letter}": getattr(matmul, letter) for letter in "qkvw"}

"""A diffusers denoiser with every convolution, linear layer and attention product fake-quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
from torch import nn

from edadm.errors import EdadmError
from edadm.quant.attention import attention_modules, check_processor, quantize_products
from edadm.quant.families import family_of
from edadm.quant.layers import AttentionMatmul, LayerBits, QuantLayer
from edadm.quant.quantizer import ActivationQuantizer, is_float

FLOAT = "float"  # role and unit of what a family leaves in floating point
WIDTHS = (2, 3, 4, 5, 6, 7, 8, 16, 32)
QUANTIZABLE = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d


@dataclass(frozen=True)
class Bits:
    """Nominal bit widths; 16 and 32 leave the tensor in floating point."""

    weight: int
    act: int
    softmax: int = 8

    def __post_init__(self) -> None:
        for what in ("weight", "act", "softmax"):
            if getattr(self, what) not in WIDTHS:
                raise EdadmError(
                    f"bits.{what}={getattr(self, what)}: choose 2 to 8, or 16 / 32 to leave it in floating point"
                )


@dataclass(frozen=True)
class SitePlan:
    """Which sites are quantized and how far edge layers deviate from the nominal bits.

    edge: role of a layer -> {"weight": bits, "act": bits}; a width never replaces a nominal 16 or 32.
    """

    edge: Mapping[str, Mapping[str, int]] = field(default_factory=lambda: MappingProxyType({}))
    split: bool = True
    matmuls: bool = True

    def layer_bits(self, role: str, bits: Bits) -> LayerBits:
        rule = self.edge.get(role, {})
        weight = bits.weight if is_float(bits.weight) else rule.get("weight", bits.weight)
        act = bits.act if is_float(bits.act) else rule.get("act", bits.act)
        return LayerBits(weight, act)


@dataclass(frozen=True)
class Site:
    """One quantizer: where it is, what it quantizes and at how many bits."""

    name: str
    role: str
    kind: str
    bits: int
    unit: str


@dataclass(frozen=True)
class Unit:
    """A part of the network that is reconstructed as a whole.

    kind: "block" (several layers), "layer" (one layer) or "matmul" (the products of an attention).
    layers: in registration order. end: name of the layer that ends the main path of a block. last: name of the one that
    the original code registers last. tokens: whether axis 1 of a 3-d tensor is tokens in the original code.
    """

    name: str
    kind: str
    module: nn.Module
    layers: tuple[QuantLayer, ...]
    matmuls: tuple[AttentionMatmul, ...]
    end: str | None
    last: str | None
    tokens: bool

    @property
    def activation_quantizers(self) -> list[ActivationQuantizer]:
        return [q for q in self.module.modules() if isinstance(q, ActivationQuantizer) and not is_float(q.bits)]


class QuantModel(nn.Module):
    """A denoiser whose layers were replaced by quantized ones; called like the denoiser itself.

    Build it with ``QuantModel.wrap``; both quantizer kinds start switched off, so it equals the wrapped network.
    """

    def __init__(self, model: nn.Module, bits: Bits, plan: SitePlan):
        super().__init__()
        self.model, self.bits, self.plan = model, bits, plan
        self.family = family_of(model)
        self.layers: dict[str, QuantLayer] = {}
        self.matmuls: dict[str, AttentionMatmul] = {}

    @classmethod
    def wrap(cls, model: nn.Module, bits: Bits, plan: SitePlan | None = None) -> QuantModel:
        """Replace the layers of ``model`` in place.

        Raises EdadmError naming a module that has no role, an attention whose products are hidden, or a layer that
        would stay in floating point.
        """
        quant_model = cls(model.eval().requires_grad_(False), bits, plan or SitePlan())
        quant_model._check_forward()
        quant_model._replace_layers()
        quant_model._replace_products()
        quant_model.units("block")
        return quant_model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def _check_forward(self) -> None:
        for name, module in attention_modules(self.model):
            check_processor(name, module)
        for name, module in self.model.named_modules():
            if getattr(module, "_chunk_size", None) is not None:
                raise EdadmError(f"{name} feeds forward in chunks: call disable_forward_chunking() first")

    def _replace_layers(self) -> None:
        modules = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, QUANTIZABLE) and not self.family.is_float(name)
        }
        roles = {name: self._role(name, module) for name, module in modules.items()}
        splits = self.family.splits(self.model) if self.plan.split else {}
        for name, module in modules.items():
            role = roles[name]
            layer = QuantLayer(module, name, role, self.plan.layer_bits(role, self.bits), splits.get(name))
            self.model.set_submodule(name, layer)
            self.layers[name] = layer
        for name, module in self.model.named_modules(remove_duplicate=False):
            if isinstance(module, QUANTIZABLE) and not self.family.is_float(name):
                raise EdadmError(f"{name} is the same module as another layer: give it a copy of its own")

    def _replace_products(self) -> None:
        if not self.plan.matmuls:
            return
        softmax_bits = self.bits.softmax if not is_float(self.bits.act) else 32
        for name, module in attention_modules(self.model):
            role = self._role(f"{name}.matmul", module)
            matmul = AttentionMatmul(f"{name}.matmul", role, self.bits.act, softmax_bits)
            quantize_products(name, module, matmul)
            self.matmuls[matmul.name] = matmul

    def _role(self, name: str, module: nn.Module) -> str:
        role = self.family.layer_role(name)
        if role is None:
            raise EdadmError(f"no role for {name} ({type(module).__name__}): add it to the roles in {self.family.file}")
        return role

    def units(self, granularity: str) -> list[Unit]:
        """Return the reconstruction units in execution order, "block" or "layer" sized."""
        blocks = [self._unit(name, self.model.get_submodule(name)) for name in self.family.units(self.model)]
        covered = [layer.name for unit in blocks for layer in unit.layers]
        if sorted(covered) != sorted(self.layers):
            missing = sorted(set(self.layers) - set(covered)) or sorted({n for n in covered if covered.count(n) > 1})
            raise EdadmError(f"layers in no unit or in two: {', '.join(missing)}; see units() of {self.family.file}")
        if granularity == "block":
            return blocks
        if granularity == "layer":
            return [part for unit in blocks for part in self._split_unit(unit)]
        raise ValueError(f"granularity must be 'block' or 'layer', not {granularity!r}")

    def _unit(self, name: str, module: nn.Module) -> Unit:
        layers = tuple(m for m in module.modules() if isinstance(m, QuantLayer))
        matmuls = tuple(m for m in module.modules() if isinstance(m, AttentionMatmul))
        kinds = {QuantLayer: "layer", AttentionMatmul: "matmul"}
        kind = kinds.get(type(module), "block")
        end = _named(layers, self.family.main_path_end) if kind == "block" else None
        last = _named(layers, self.family.last_registered) or layers[-1].name if kind == "block" else None
        return Unit(name, kind, module, layers, matmuls, end, last, self.family.has_tokens(name))

    def _split_unit(self, unit: Unit) -> list[Unit]:
        if unit.kind == "layer":
            return [unit]
        modules: dict[str, nn.Module] = {layer.name: layer for layer in unit.layers}
        modules |= {matmul.name: matmul for matmul in unit.matmuls}
        return [self._unit(name, modules[name]) for name in sorted(modules, key=self.family.position)]

    @property
    def activation_quantizers(self) -> list[ActivationQuantizer]:
        """The activation quantizers in use, in registration order."""
        return [q for q in self.modules() if isinstance(q, ActivationQuantizer) and not is_float(q.bits)]

    def set_state(self, weights: bool, activations: bool) -> None:
        """Switch weight and activation quantization of the whole network on or off."""
        for layer in self.layers.values():
            if not weights and layer.weight_is_quantized:
                raise EdadmError("a loaded quantized model has no full-precision weights: load the original network")
            layer.weight_enabled = weights
        for quantizer in self.activation_quantizers:
            quantizer.enabled = activations

    def sites(self) -> list[Site]:
        """List every quantizer in execution order of its unit; 32 bits marks a site left in floating point."""
        return [site for unit in self.units("block") for site in _unit_sites(unit)] + self._float_sites()

    def _float_sites(self) -> list[Site]:
        """List the weights of layers that the family leaves alone, as embeddings of a class are."""
        left = [name for name, module in self.model.named_modules() if isinstance(module, QUANTIZABLE)]
        return [Site(f"{name}.weight", FLOAT, "weight", 32, FLOAT) for name in left]


def _named(layers: tuple[QuantLayer, ...], roles: tuple[str, ...]) -> str | None:
    """Return the name of the last layer that has the first of the roles that any has."""
    found = ([layer.name for layer in layers if layer.role == role] for role in roles)
    return next((names[-1] for names in found if names), None)


def _unit_sites(unit: Unit) -> list[Site]:
    sites = []
    for layer in unit.layers:
        sites += [Site(q.name, layer.role, "weight", q.bits, unit.name) for q in layer.weight_quantizers]
        sites += [Site(q.name, layer.role, "act", q.bits, unit.name) for q in layer.act_quantizers]
    for matmul in unit.matmuls:
        sites += [Site(q.name, matmul.role, "matmul", q.bits, unit.name) for q in matmul.quantizers]
    return sites


def unit_state(unit: Unit) -> dict[str, torch.Tensor]:
    """Return what reconstruction changes in a unit: rounding masks (bool) and activation scales."""
    state = {}
    for layer in unit.layers:
        for q in layer.weight_quantizers:
            if q.hard_up is not None:
                state[f"{q.name}.hard_up"] = q.hard_up.clone()
    for quantizer in unit.activation_quantizers:
        state[f"{quantizer.name}.scale"] = quantizer.scale.detach().clone()
    return state


@torch.no_grad()
def load_unit_state(unit: Unit, state: Mapping[str, torch.Tensor]) -> None:
    """Restore what ``unit_state`` returned, to the bit."""
    for layer in unit.layers:
        for q in layer.weight_quantizers:
            if f"{q.name}.hard_up" in state:
                q.hard_up = state[f"{q.name}.hard_up"].to(layer.weight.device, torch.bool)
        layer.invalidate()
    for quantizer in unit.activation_quantizers:
        quantizer.scale.copy_(state[f"{quantizer.name}.scale"])

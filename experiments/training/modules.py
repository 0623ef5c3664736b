"""Diffusers modules with first weights, as the original codes draw them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from edadm.tasks.model_folder import empty_model

# the last layer of each residual branch and of the network, which the original codes start at zero
_ZERO_IN_UNET = ("conv2", "proj_out", "conv_out")
_ZERO_IN_DIT = ("norm1.linear", "proj_out_1", "proj_out_2")


def fresh_model(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """Return a module of `edadm.tasks.model_folder` with the first weights that its layers draw by themselves."""
    model = empty_model(class_name, config)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
        if callable(draw := getattr(module, "reset_parameters", None)):
            draw()
    return model


@torch.no_grad()
def fresh_unet(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """Return a UNet whose residual branches and output start at zero."""
    model = fresh_model(class_name, config)
    _zero(model, _ZERO_IN_UNET)
    return model


@torch.no_grad()
def fresh_dit(class_name: str, config: Mapping[str, Any]) -> nn.Module:
    """Return a DiT with adaLN-Zero: Xavier linear layers, small embeddings, modulations and output at zero."""
    model = fresh_model(class_name, config)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) or ".timestep_embedder.linear" in name:
            nn.init.normal_(module.weight, std=0.02)
    _zero(model, _ZERO_IN_DIT)
    return model


def _zero(model: nn.Module, ends: tuple[str, ...]) -> None:
    for name, module in model.named_modules():
        if name.endswith(ends):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)

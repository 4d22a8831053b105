"""GPT-2 as users of Opacus write it when they train all of its weights: modules that Opacus knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def as_linears(model: Any) -> Any:
    """Every Conv1D as a Linear: for others Opacus falls back to a slow rule."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Conv1D)]
    for name, layer in layers:
        linear = nn.Linear(*layer.weight.shape)
        with torch.no_grad():
            linear.weight.copy_(layer.weight.T)
            linear.bias.copy_(layer.bias)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)
    return model


def untied(model: Any) -> Any:
    """The output layer frozen, still on the embedding's memory: ghost clipping refuses tied weights.

    Opacus computes less here than the others do.
    """
    model.lm_head.weight = nn.Parameter(model.transformer.wte.weight.detach(), requires_grad=False)
    return model

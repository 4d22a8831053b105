"""GPT-2 as users of Opacus write it: nothing but modules that Opacus knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tributary_worker import lora


class TwoLinears(nn.Module):
    """A frozen layer and its adapter as two linear modules, of which the second is trained."""

    def __init__(self, base: nn.Module, rank: int, alpha: float) -> None:
        super().__init__()
        inputs, outputs = lora.features(base)
        self.base = base
        self.scaling = alpha / rank
        self.lora_a = nn.Linear(inputs, rank, bias=False).requires_grad_(False)
        self.lora_b = nn.Linear(rank, outputs, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x: Tensor) -> Tensor:
        update: Tensor = self.lora_b(self.lora_a(x))
        output: Tensor = self.base(x) + self.scaling * update
        return output


def with_adapters(model: Any, rank: int, alpha: float) -> Any:
    """Adapters on the layers that ours are on."""
    model.requires_grad_(False)
    for name in lora.target_names(model, lora.LoraSettings(rank, alpha)):
        replace(model, name, TwoLinears(model.get_submodule(name), rank, alpha))
    return model


def as_linears(model: Any) -> Any:
    """Every Conv1D as a Linear: for others Opacus falls back to a slow rule."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Conv1D)]
    for name, layer in layers:
        linear = nn.Linear(*layer.weight.shape)
        with torch.no_grad():
            linear.weight.copy_(layer.weight.T)
            linear.bias.copy_(layer.bias)
        replace(model, name, linear)
    return model


def untied(model: Any) -> Any:
    """The output layer frozen, still on the embedding's memory: ghost clipping refuses tied weights.

    Opacus computes less here than the others do.
    """
    model.lm_head.weight = nn.Parameter(model.transformer.wte.weight.detach(), requires_grad=False)
    return model


def replace(model: Any, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)

"""Low-rank adapters (LoRA, Hu et al. 2021) on linear layers, with factors that can be swapped for per-example
copies.

y = base(x) + (alpha / rank) * (x A^T) B^T, with A (rank, in) and B (out, rank). A starts random and B at
zero. With `freeze_a` only B is trained: the noised deltas of several clients can then be averaged, since
mean(B) A = mean(B A).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tributary_worker.lora_init import frozen_a
from tributary_worker.lora_names import factor_name, target_leaves, targets
from tributary_worker.privacy.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Shape of the adapters. `targets` are the last parts of module names; empty takes the architecture's
    default."""

    rank: int
    alpha: float
    freeze_a: bool = True
    targets: tuple[str, ...] = ()


class LoraLinear(nn.Module):
    """A frozen linear layer and its adapter. `example_a` and `example_b` replace the factors while a gradient
    per record is taken: (batch, rank, in) and (batch, out, rank), one copy for each record of the
    micro-batch."""

    def __init__(self, base: nn.Module, settings: LoraSettings) -> None:
        super().__init__()
        inputs, outputs = features(base)
        weight: Tensor = base.weight
        self.base = base
        self.scaling = settings.alpha / settings.rank
        self.lora_a = nn.Parameter(torch.zeros(settings.rank, inputs, device=weight.device))
        self.lora_b = nn.Parameter(torch.zeros(outputs, settings.rank, device=weight.device))
        self.lora_a.requires_grad_(not settings.freeze_a)
        self.example_a: Tensor | None = None
        self.example_b: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        a = self.lora_a if self.example_a is None else self.example_a
        b = self.lora_b if self.example_b is None else self.example_b
        update = _apply(_apply(x.to(torch.float32), a), b)
        return self.base(x) + (self.scaling * update).to(x.dtype)


def _apply(x: Tensor, factor: Tensor) -> Tensor:
    """x (batch, ..., in) times the transpose of a factor (out, in), or of one per record (batch, out, in)."""
    if factor.dim() == 2:
        return x @ factor.T
    if x.shape[0] != factor.shape[0]:
        raise UnsupportedError(
            f"a layer is called with {x.shape[0]} rows for {factor.shape[0]} records, so that they cannot be "
            "told apart: leave it out of method.lora.targetModules"
        )
    product = torch.bmm(x.reshape(x.shape[0], -1, x.shape[-1]), factor.transpose(1, 2))
    return product.view(*x.shape[:-1], factor.shape[1])


def features(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a layer that can carry an adapter. GPT-2's Conv1D keeps its weight transposed."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    raise UnsupportedError(
        f"LoRA adapts Linear and Conv1D layers, not {type(module).__name__}: change method.lora.targetModules"
    )


def target_names(model: Any, settings: LoraSettings) -> list[str]:
    """Full names of the modules to adapt, in the model's order."""
    wanted = target_leaves(model.config.model_type, settings.targets)
    if not wanted:
        raise UnsupportedError(
            f"no default targets for model type {model.config.model_type!r}: set method.lora.targetModules"
        )
    names = targets((name for name, _ in model.named_modules()), wanted)
    if not names:
        raise UnsupportedError(
            f"no module of the model is called {', '.join(wanted)}: see method.lora.targetModules"
        )
    return names


def add_adapters(model: Any, settings: LoraSettings, seed: str) -> list[str]:
    """Freeze the model and put an adapter on each target; gives the targets' names.

    A is drawn from `seed` and the target's name alone, so all clients of a round share it and nobody has to
    send it.
    """
    model.requires_grad_(False)
    names = target_names(model, settings)
    for name in names:
        parent = model.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        adapter = LoraLinear(getattr(parent, leaf), settings)
        with torch.no_grad():
            adapter.lora_a.copy_(torch.from_numpy(frozen_a(seed, name, *adapter.lora_a.shape)))
        setattr(parent, leaf, adapter)
    return names


def adapters(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def peft_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Both factors of every adapter, fp32 on the CPU, under the names of PEFT's
    `adapter_model.safetensors`."""
    tensors: dict[str, Tensor] = {}
    for name, adapter in adapters(model):
        tensors[factor_name(name, "lora_A")] = _saved(adapter.lora_a)
        tensors[factor_name(name, "lora_B")] = _saved(adapter.lora_b)
    return tensors


def _saved(factor: Tensor) -> Tensor:
    return factor.detach().to("cpu", torch.float32).contiguous().clone()

"""Low-rank adapters (LoRA, Hu et al. 2021) on linear layers.

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

from tributary_api.shared import TaskKind
from tributary_worker.lora_init import frozen_a
from tributary_worker.lora_names import head_of, target_leaves, targets
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
    """A frozen linear layer and its adapter, in fp32 whatever the base's type is."""

    def __init__(self, base: nn.Module, settings: LoraSettings) -> None:
        super().__init__()
        inputs, outputs = features(base)
        self.base = base
        self.scaling = settings.alpha / settings.rank
        shape = {"bias": False, "device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(inputs, settings.rank, **shape)
        self.lora_B = nn.Linear(settings.rank, outputs, **shape)
        nn.init.zeros_(self.lora_B.weight)
        self.lora_A.requires_grad_(not settings.freeze_a)

    @property
    def lora_a(self) -> nn.Parameter:
        return self.lora_A.weight

    @property
    def lora_b(self) -> nn.Parameter:
        return self.lora_B.weight

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.base(x)
        update = self.lora_B(self.lora_A(x.to(torch.float32)))
        return output + (self.scaling * update).to(output.dtype)


def features(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a layer that can carry an adapter. GPT-2's Conv1D keeps its weight transposed."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        # Not the weight's shape: ZeRO 3 takes the weight away.
        return int(module.nx), int(module.nf)
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


def add_adapters(model: Any, settings: LoraSettings, seed: str, task: TaskKind = TaskKind.CAUSAL_LM) -> None:
    """Freeze the model, put an adapter on each target, and leave the head of a classifier to be trained in
    full.

    A is drawn from `seed` and the target's name alone, so all clients of a round share it and nobody has to
    send it.
    """
    model.requires_grad_(False)
    head = head_of(model.config.model_type, task)
    for name in target_names(model, settings):
        if name != head:
            _replace(model, name, _adapter(model.get_submodule(name), settings, seed, name))
    if head is not None:
        _train_in_full(model.get_submodule(head))


def _adapter(base: nn.Module, settings: LoraSettings, seed: str, name: str) -> LoraLinear:
    adapter = LoraLinear(base, settings)
    with torch.no_grad():
        adapter.lora_a.copy_(torch.from_numpy(frozen_a(seed, name, *adapter.lora_a.shape)))
    return adapter


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _train_in_full(head: nn.Module) -> None:
    head.to(torch.float32).requires_grad_(True)
    # The model before it may be in low precision.
    head.register_forward_pre_hook(lambda _module, inputs: (inputs[0].to(torch.float32), *inputs[1:]))


def adapters(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module

"""A gradient per record for the trained factors of LoRA, in one backward pass.

During the forward each trained factor is replaced by a leaf tensor (batch, *shape) that repeats it without
copying; the gradient of the summed loss with respect to that leaf is each record's own gradient. No parameter
is touched, so none of DeepSpeed's gradient hooks fires.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tributary_worker import lora
from tributary_worker.privacy.errors import PrivacyError


@dataclass(frozen=True, slots=True)
class _Slot:
    """A trained factor: its name, its module, and the attributes that hold the parameter and its copies."""

    name: str
    module: lora.LoraLinear
    parameter_attribute: str
    copies_attribute: str

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.parameter_attribute)


class PerExampleAdapters:
    """All trained factors of a model, in a fixed order: the flat vector that clipping and noise speak of."""

    def __init__(self, model: nn.Module) -> None:
        self._slots = [slot for name, module in lora.adapters(model) for slot in _trained(name, module)]
        self.names = [slot.name for slot in self._slots]
        self.parameters = [slot.parameter for slot in self._slots]
        self.numel = sum(p.numel() for p in self.parameters)
        _check_coverage(model, self.parameters)

    def gradients(self, losses: Callable[[], Tensor], batch_size: int) -> list[Tensor]:
        """Each record's gradient of its own loss: one (batch, *shape) per parameter. `losses()` gives
        (batch,)."""
        with self._copies(batch_size) as copies, torch.enable_grad():
            values = losses()
            if values.shape != (batch_size,):
                raise PrivacyError(
                    f"the objective gave losses of shape {tuple(values.shape)} for {batch_size} records"
                )
            # A factor that the forward never used raises here: it would train on noise alone, unnoticed.
            return list(torch.autograd.grad(values.sum(), copies))

    @contextmanager
    def _copies(self, batch_size: int) -> Iterator[Sequence[Tensor]]:
        copies = [_leaf(p, batch_size) for p in self.parameters]
        for slot, copy in zip(self._slots, copies, strict=True):
            setattr(slot.module, slot.copies_attribute, copy)
        try:
            yield copies
        finally:
            for slot in self._slots:
                setattr(slot.module, slot.copies_attribute, None)


def _leaf(parameter: Tensor, batch_size: int) -> Tensor:
    return parameter.detach().to(torch.float32).expand(batch_size, *parameter.shape).requires_grad_()


def _trained(name: str, module: lora.LoraLinear) -> Iterator[_Slot]:
    if module.lora_a.requires_grad:
        yield _Slot(f"{name}.lora_A.weight", module, "lora_a", "example_a")
    if module.lora_b.requires_grad:
        yield _Slot(f"{name}.lora_B.weight", module, "lora_b", "example_b")


def _check_coverage(model: nn.Module, covered: Sequence[nn.Parameter]) -> None:
    """Every trainable parameter must be clipped per record; one that is not would be published without
    privacy."""
    known = {id(p) for p in covered}
    missed = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if missed:
        raise PrivacyError(f"no gradient per record for trainable parameters: {', '.join(missed[:5])}")
    if not covered:
        raise PrivacyError("the model has no trainable parameters")

"""The layers that can be trained privately, and how the gradient of each of their parameters is made.

A rule takes the layer, what it was given and the gradient of the loss at its output, each with the records
first, and gives the parameter's gradient for each record.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.pytorch_utils import Conv1D

from tributary_worker.privacy.parts import Dense, OuterSum, Part

Rule = Callable[[Any, Tensor, Tensor], Part]


def _linear_weight(_layer: nn.Linear, given: Tensor, gradient: Tensor) -> Part:
    return OuterSum(_positions(gradient), _positions(given), gradient.shape[-1])


def _transposed_weight(_layer: Conv1D, given: Tensor, gradient: Tensor) -> Part:
    """GPT-2's Conv1D: a linear layer that keeps its weight as (inputs, outputs)."""
    return OuterSum(_positions(given), _positions(gradient), given.shape[-1])


def _embedding_weight(layer: nn.Embedding, given: Tensor, gradient: Tensor) -> Part:
    rows = given.reshape(given.shape[0], -1)
    right = _positions(gradient)
    if layer.padding_idx is not None:
        right = right.masked_fill((rows == layer.padding_idx)[..., None], 0.0)
    return OuterSum(rows, right, layer.num_embeddings)


def _layer_norm_weight(layer: nn.LayerNorm, given: Tensor, gradient: Tensor) -> Part:
    normed = F.layer_norm(given.float(), layer.normalized_shape, eps=layer.eps)
    return Dense(_positions(gradient.float() * normed).sum(1))


def _rms_norm_weight(layer: Any, given: Tensor, gradient: Tensor) -> Part:
    """y = weight * x / sqrt(mean(x**2) + eps) (Zhang and Sennrich 2019)."""
    given = given.float()
    normed = given * torch.rsqrt(given.square().mean(-1, keepdim=True) + layer.variance_epsilon)
    return Dense(_positions(gradient.float() * normed).sum(1))


def _bias(_layer: nn.Module, _given: Tensor, gradient: Tensor) -> Part:
    return Dense(_positions(gradient).sum(1))


RULES: Mapping[type[nn.Module], Mapping[str, Rule]] = {
    nn.Linear: {"weight": _linear_weight, "bias": _bias},
    Conv1D: {"weight": _transposed_weight, "bias": _bias},
    nn.Embedding: {"weight": _embedding_weight},
    nn.LayerNorm: {"weight": _layer_norm_weight, "bias": _bias},
    LlamaRMSNorm: {"weight": _rms_norm_weight},
    MistralRMSNorm: {"weight": _rms_norm_weight},
    Qwen2RMSNorm: {"weight": _rms_norm_weight},
}
"""By exact type: a subclass may compute something else."""


def rule_for(layer: nn.Module, parameter: str) -> Rule | None:
    """How to make the gradient of the layer's parameter; None if it is not covered."""
    return RULES.get(type(layer), {}).get(parameter)


def _positions(values: Tensor) -> Tensor:
    """(batch, ..., width) as (batch, positions, width), fp32."""
    return values.float().reshape(values.shape[0], -1, values.shape[-1])

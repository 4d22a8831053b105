"""What one record may contribute: a gradient of norm C at most, and nothing at all if it is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tributary_worker.privacy.parts import Part, squared_norms


def per_example_norms(gradients: Sequence[Sequence[Part]]) -> Tensor:
    """Euclidean norm of each record's gradient over all trained parameters together; shape (batch,), float64.

    `gradients` has the parts of one parameter in each entry. The sum of squares is taken in float64: in
    float32 its rounding alone could let a record exceed C by more than 1e-6.
    """
    return torch.stack([squared_norms(parts) for parts in gradients]).sum(0).sqrt()


def clip_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    """min(1, C / norm) for each record, 0 where the norm is not finite; shape (batch,), float64."""
    factors = (max_grad_norm / norms.clamp(min=max_grad_norm)).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


def factors_of(norms: Tensor, max_grad_norm: float, weights: Tensor) -> Tensor:
    """What each record's gradient is multiplied with; `weights` (batch,) is 1 for a record and 0 for an empty
    slot. Shape (batch,), fp32."""
    return (clip_factors(norms, max_grad_norm) * weights.to(torch.float64)).to(torch.float32)


def add_clipped(
    gradients: Sequence[list[Part]], max_grad_norm: float, weights: Tensor, totals: Sequence[Tensor]
) -> None:
    """totals += sum over records of weight * min(1, C / norm) * gradient, for each parameter, in fp32.

    This is `s` of Abadi et al. 2016, algorithm 1. The parts are used up, so that their memory is free again.
    """
    factors = factors_of(per_example_norms(gradients), max_grad_norm, weights)
    for parts, total in zip(gradients, totals, strict=True):
        while parts:
            parts.pop().add_to(total, factors)

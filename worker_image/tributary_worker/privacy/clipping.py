"""What one record may contribute: a gradient of norm C at most, and nothing at all if it is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def per_example_norms(gradients: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of each record's gradient over all trained parameters together; shape (batch,), float64.

    `gradients` has one tensor (batch, *parameter shape) per parameter. The sum of squares is taken in
    float64: in float32 its rounding alone could let a record exceed C by more than 1e-6.
    """
    squares = [g.flatten(1).to(torch.float64).square().sum(1) for g in gradients]
    return torch.stack(squares).sum(0).sqrt()


def clip_factors(norms: Tensor, max_grad_norm: float) -> Tensor:
    """min(1, C / norm) for each record, 0 where the norm is not finite; shape (batch,), float64."""
    factors = (max_grad_norm / norms.clamp(min=max_grad_norm)).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


def clip(gradients: Sequence[Tensor], max_grad_norm: float, weights: Tensor) -> list[Tensor]:
    """Sum over records of weight * min(1, C / norm) * gradient, per parameter, in float32.

    `weights` (batch,) is 1 for a record and 0 for an empty slot. This is `s` of Abadi et al. 2016, algorithm
    1.
    """
    factors = clip_factors(per_example_norms(gradients), max_grad_norm) * weights.to(torch.float64)
    return [_weighted_sum(g, factors) for g in gradients]


def scale(total: Tensor, divisor: int) -> Tensor:
    """The mean over the *expected* batch: the divisor is public, the size of a drawn batch is not."""
    return total / divisor


def _weighted_sum(gradient: Tensor, factors: Tensor) -> Tensor:
    # 0 * inf is not 0: a record that contributes nothing is replaced, not multiplied away.
    contributes = (factors > 0).view(-1, *[1] * (gradient.dim() - 1))
    kept = torch.where(contributes, gradient.to(torch.float32), 0.0)
    return torch.tensordot(factors.to(torch.float32), kept, dims=1)

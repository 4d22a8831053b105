"""The gradients of all records of a micro-batch, for one parameter, without holding them.

The gradient of a weight that is applied at T positions of a record is a sum of T outer products. Its norm and
its clipped sum over records follow from the vectors alone: "ghost" norms (Goodfellow 2015, arXiv:1510.01799;
Li et al. 2022, arXiv:2110.05679) and book-keeping (Bu et al. 2023, arXiv:2210.00038). Norms are taken in
float64: the T**2 inner products of a ghost norm cancel each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

ELEMENTS_PER_CHUNK = 2**22
"""Of a temporary copy: 32 MiB in float64, whatever the vocabulary."""


class Part(Protocol):
    """What one call of a layer adds to the gradient of one parameter, for each record."""

    def dense(self) -> Tensor:
        """The gradients themselves, (batch, *parameter shape), fp32."""
        ...

    def add_to(self, total: Tensor, factors: Tensor) -> None:
        """total += sum over records of factor * gradient. A record with factor 0 adds nothing, even if it is
        not finite. `total` has the parameter's shape, `factors` is (batch,), both fp32."""
        ...


@dataclass(frozen=True, slots=True)
class Dense:
    """Gradients as they are: (batch, *parameter shape)."""

    gradients: Tensor

    def dense(self) -> Tensor:
        return self.gradients

    def add_to(self, total: Tensor, factors: Tensor) -> None:
        total += torch.tensordot(factors, _kept(self.gradients, factors), dims=1)


@dataclass(frozen=True, slots=True)
class OuterSum:
    """Record i's gradient is the sum over positions t of left[i, t] right[i, t]^T, a (rows, columns) matrix.

    `left` is (batch, T, rows), or integers (batch, T) for vectors that are 1 in one row and 0 elsewhere;
    `right` is (batch, T, columns).
    """

    left: Tensor
    right: Tensor
    rows: int

    @property
    def is_smaller_dense(self) -> bool:
        """Whether the gradients take less memory than the vectors do; they never take more time."""
        positions, columns = self.right.shape[1:]
        width = 1 if _is_index(self.left) else self.rows
        return bool(self.rows * columns <= positions * (width + columns))

    def dense(self) -> Tensor:
        batch, _, columns = self.right.shape
        if not _is_index(self.left):
            return torch.bmm(self.left.transpose(1, 2), self.right)
        shifts = self.rows * torch.arange(batch, device=self.left.device)
        places = (self.left + shifts[:, None]).flatten()
        sums = self.right.new_zeros(batch * self.rows, columns)
        return sums.index_add_(0, places, self.right.flatten(0, 1)).view(batch, self.rows, columns)

    def add_to(self, total: Tensor, factors: Tensor) -> None:
        right = (_kept(self.right, factors) * factors[:, None, None]).flatten(0, 1)
        if _is_index(self.left):
            total.index_add_(0, self.left.flatten(), right)
            return
        for piece in _chunks(self.left):
            total[piece].addmm_(_kept(self.left[..., piece], factors).flatten(0, 1).T, right)

    def inner(self, other: OuterSum) -> Tensor:
        """<G_i, H_i> of each record, (batch,), float64: the sum of the T**2 products of inner products."""
        return (_gram(self.left, other.left) * _gram(self.right, other.right)).sum((1, 2))


def squared_norms(parts: Sequence[Part]) -> Tensor:
    """Squared norm of each record's gradient for one parameter, the sum of its parts; (batch,), float64.

    A weight that is used twice, such as a tied embedding, has the cross terms of its uses in it.
    """
    outer = [part for part in parts if isinstance(part, OuterSum)]
    if len(outer) == len(parts):
        pairs = [(i, j) for i in range(len(outer)) for j in range(i + 1)]
        terms = [(1 if i == j else 2) * outer[i].inner(outer[j]) for i, j in pairs]
        # Rounding may leave a sum that is due to be 0 just below.
        return torch.stack(terms).sum(0).clamp(min=0)
    gradients = parts[0].dense()
    for part in parts[1:]:
        gradients = gradients + part.dense()
    return torch.linalg.vector_norm(gradients.flatten(1), dim=1, dtype=torch.float64).square()


def _kept(rows: Tensor, factors: Tensor) -> Tensor:
    """`rows` (batch, ...) with those of factor 0 replaced: 0 * inf is not 0."""
    return torch.where((factors > 0).view(-1, *[1] * (rows.dim() - 1)), rows, 0.0)


def _gram(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of all positions of `left` (batch, T, ...) with those of `right` (batch, S, ...), for
    each record: (batch, T, S), float64. Either may be indices of one-hot vectors."""
    if _is_index(left) and _is_index(right):
        return (left[:, :, None] == right[:, None, :]).to(torch.float64)
    if _is_index(right):
        return _gram(right, left).transpose(1, 2)
    if _is_index(left):
        places = left[:, None, :].expand(-1, right.shape[1], -1)
        return right.gather(2, places).transpose(1, 2).to(torch.float64)
    total = torch.zeros(left.shape[0], left.shape[1], right.shape[1], dtype=torch.float64, device=left.device)
    for piece in _chunks(left):
        total.baddbmm_(left[..., piece].double(), right[..., piece].double().transpose(1, 2))
    return total


def _chunks(vectors: Tensor) -> Iterator[slice]:
    """Ranges of the last dimension of (batch, T, width)."""
    width = vectors.shape[-1]
    step = max(1, ELEMENTS_PER_CHUNK // (vectors.shape[0] * vectors.shape[1]))
    for start in range(0, width, step):
        yield slice(start, min(start + step, width))


def _is_index(vectors: Tensor) -> bool:
    return not vectors.is_floating_point()

"""Coordinate-wise trimmed mean: of each element, the mean without the f largest and the f smallest values.

Yin, Chen, Ramchandran and Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical
Rates", ICML 2018, definition 2, with β n = f. Needs n >= 2f + 1 deltas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tributary_worker.aggregation.numbers import Array
from tributary_worker.aggregation.strategies.sorting import ranked


def mean_of_ranks(values: Array, ranks: range) -> Array:
    """Of each element, the mean (elements,) float64 of its values of these ranks, added in their order."""
    mean = np.zeros(values.shape[1])
    for block, rows in ranked(values, ranks):
        total = mean[block]
        for row in rows:
            total += row
        total /= len(ranks)
    return mean


def same_for_all(declared: Array) -> Array:
    return np.full(len(declared), 1.0 / len(declared))


@dataclass(frozen=True, slots=True)
class TrimmedMean:
    """All clients count alike: the order of values has no place for weights."""

    byzantine_clients: int

    needs_gram: ClassVar[bool] = False
    is_linear: ClassVar[bool] = False

    def weights(self, declared: Array, _gram: Array | None, /) -> Array:
        return same_for_all(declared)

    def combine(self, values: Array, _weights: Array, /) -> Array:
        left = range(self.byzantine_clients, len(values) - self.byzantine_clients)
        if not left:
            raise ValueError(f"trimming {self.byzantine_clients} at each end leaves none of {len(values)}")
        return mean_of_ranks(values, left)

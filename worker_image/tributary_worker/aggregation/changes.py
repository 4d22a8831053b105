"""What the round adds to one weight, computed a block of rows at a time.

Sums are made element by element in float64 and in a fixed order, never by BLAS: the same deltas give the same
bytes on every processor and with any number of threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from tributary_worker.aggregation.numbers import Array


@dataclass(frozen=True, slots=True)
class LowRank:
    """scale · left @ right, for a weight (rows, columns): left (rows, rank), right (rank, columns)."""

    left: Array
    right: Array
    scale: float

    def rows(self, start: int, stop: int) -> Array:
        total = np.zeros((stop - start, self.right.shape[1]))
        for k in range(self.right.shape[0]):
            total += np.multiply.outer(self.left[start:stop, k], self.right[k])
        return self.scale * total


@dataclass(frozen=True, slots=True)
class Dense:
    """A change of every element: values (rows, columns)."""

    values: Array

    def rows(self, start: int, stop: int) -> Array:
        return self.values[start:stop]


Change = LowRank | Dense


def weighted_mean(weighted: Iterable[tuple[float, Array]]) -> Array:
    """Σ w·x / Σ w in float64, in the given order (FedAvg: McMahan et al. 2017, algorithm 1)."""
    total, weight_sum = None, 0.0
    for weight, values in weighted:
        total = weight * values if total is None else total + weight * values
        weight_sum += weight
    if total is None:
        raise ValueError("the mean of no deltas")
    return total / weight_sum

"""What the round adds to a weight, a block of rows at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tributary_worker.aggregation.numbers import Array


@dataclass(frozen=True, slots=True)
class Change:
    """Values (elements,) that are added to a tensor of the base model from its element `start` on."""

    tensor: str
    start: int
    values: Array


@dataclass(frozen=True, slots=True)
class LowRank:
    """scale · left @ right, for a weight (rows, columns): left (rows, rank), right (rank, columns).

    Added up element by element in float64, never by BLAS: equal on every processor.
    """

    left: Array
    right: Array
    scale: float

    @property
    def columns(self) -> int:
        return int(self.right.shape[1])

    def rows(self, start: int, stop: int) -> Array:
        total = np.zeros((stop - start, self.columns))
        for k in range(self.right.shape[0]):
            total += np.multiply.outer(self.left[start:stop, k], self.right[k].astype(np.float64))
        return self.scale * total

    def elements(self, start: int, stop: int) -> Array:
        """The elements from `start` to `stop`, numbered row by row."""
        first, last = start // self.columns, -(-stop // self.columns)
        offset = first * self.columns
        return self.rows(first, last).reshape(-1)[start - offset : stop - offset]

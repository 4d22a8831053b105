"""FedAdam (Reddi et al. 2021, algorithm 2)."""

from __future__ import annotations

from tributary_worker.aggregation.numbers import Array
from tributary_worker.aggregation.strategies.adaptive import Adaptive


class FedAdam(Adaptive):
    """v ← β2 v + (1 - β2) Δ²: the squares of old rounds are forgotten."""

    __slots__ = ()

    def second_moment(self, v: Array, squares: Array) -> Array:
        return self.beta2 * v + (1.0 - self.beta2) * squares

"""FedAdagrad (Reddi et al. 2021, algorithm 2)."""

from __future__ import annotations

from tributary_worker.aggregation.numbers import Array
from tributary_worker.aggregation.strategies.adaptive import Adaptive


class FedAdagrad(Adaptive):
    """v ← v + Δ²: nothing is forgotten, so steps only get smaller."""

    __slots__ = ()

    def second_moment(self, v: Array, squares: Array) -> Array:
        return v + squares

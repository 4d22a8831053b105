"""FedAvg: the weighted mean (McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from
Decentralized Data", algorithm 1)."""

from __future__ import annotations

from typing import ClassVar

from tributary_worker.aggregation.numbers import Array
from tributary_worker.aggregation.strategies.linear import Linear


class FedAvg(Linear):
    """Σ wᵢ dᵢ with wᵢ the declared weight over the sum of all."""

    needs_gram: ClassVar[bool] = False

    def weights(self, declared: Array, _gram: Array | None, /) -> Array:
        return declared / declared.sum()

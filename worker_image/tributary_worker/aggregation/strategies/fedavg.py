"""FedAvg: the weighted mean (McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from
Decentralized Data", algorithm 1)."""

from __future__ import annotations

from typing import ClassVar

from tributary_worker.aggregation.numbers import Array


class FedAvg:
    """Σ wᵢ dᵢ with wᵢ the declared weight over the sum of all."""

    needs_gram: ClassVar[bool] = False
    is_linear: ClassVar[bool] = True

    def weights(self, declared: Array, _gram: Array | None, /) -> Array:
        return declared / declared.sum()

    def combine(self, values: Array, weights: Array, /) -> Array:
        return weights @ values

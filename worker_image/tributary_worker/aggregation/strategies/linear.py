"""What strategies share whose result is a weighted sum of the deltas."""

from __future__ import annotations

from typing import ClassVar

from tributary_worker.aggregation.numbers import Array


class Linear:
    """Σ wᵢ dᵢ: the deltas may be added one after the other."""

    is_linear: ClassVar[bool] = True

    def combine(self, values: Array, weights: Array, /) -> Array:
        return weights @ values

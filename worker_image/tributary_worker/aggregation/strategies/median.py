"""Coordinate-wise median: of each element the middle value, or the mean of the two middle ones.

Yin, Chen, Ramchandran and Bartlett, "Byzantine-Robust Distributed Learning: Towards Optimal Statistical
Rates", ICML 2018, definition 1.
"""

from __future__ import annotations

from typing import ClassVar

from tributary_worker.aggregation.numbers import Array
from tributary_worker.aggregation.strategies.trimmed_mean import mean_of_ranks, same_for_all


class Median:
    """All clients count alike: the order of values has no place for weights."""

    needs_gram: ClassVar[bool] = False
    is_linear: ClassVar[bool] = False

    def weights(self, declared: Array, _gram: Array | None, /) -> Array:
        return same_for_all(declared)

    def combine(self, values: Array, _weights: Array, /) -> Array:
        return mean_of_ranks(values, range((len(values) - 1) // 2, len(values) // 2 + 1))

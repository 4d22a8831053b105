"""FedYogi (Reddi et al. 2021, algorithm 2)."""

from __future__ import annotations

import numpy as np

from tributary_worker.aggregation.numbers import Array
from tributary_worker.aggregation.strategies.adaptive import Adaptive


class FedYogi(Adaptive):
    """v ← v - (1 - β2) Δ² sign(v - Δ²): v moves by no more than the new square, so steps grow slowly."""

    __slots__ = ()

    def second_moment(self, v: Array, squares: Array) -> Array:
        return v - (1.0 - self.beta2) * squares * np.sign(v - squares)

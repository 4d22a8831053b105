"""Geometric median: the point with the smallest sum of distances to the deltas.

Pillutla, Kakade and Harchaoui, "Robust Aggregation for Federated Learning", IEEE Transactions on Signal
Processing 2022: the smoothed Weiszfeld algorithm; here every client counts once. The median is a weighted
mean of the deltas, so the inner products are all that the iteration needs.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from tributary_worker.aggregation.numbers import Array
from tributary_worker.aggregation.strategies.distances import given, squared_distances
from tributary_worker.aggregation.strategies.linear import Linear

SMOOTHING = 1e-6
"""Distances below this part of the cohort's own size count as this, or a delta could stop the iteration by
lying on its path. Distances from inner products in float64 are no more exact than about 1e-8."""
ITERATIONS_MAX = 20_000
CHANGE_MIN = 1e-10
"""Of each weight, as a part of it, between two iterations: a delta may be so long that a weight of 1e-12 is
too much."""


class GeometricMedian(Linear):
    needs_gram: ClassVar[bool] = True

    def weights(self, declared: Array, gram: Array | None, /) -> Array:
        products = given(gram)
        # Half of the deltas lie this close to the one in their midst: bad ones, fewer, cannot make it larger.
        middle = math.ceil(len(declared) / 2) - 1
        radii = np.sort(squared_distances(products), axis=1)[:, middle]
        centre = int(np.argmin(radii))
        if radii[centre] == 0.0:  # half of them are equal, which makes that point a median
            return np.eye(len(declared))[centre]
        return weiszfeld(products, SMOOTHING * math.sqrt(radii[centre]))


def weiszfeld(products: Array, smoothing: float) -> Array:
    """Weights (clients,), of sum 1, of the geometric median of points with these inner products."""
    weights, norms = np.full(len(products), 1.0 / len(products)), np.diag(products)
    for _ in range(ITERATIONS_MAX):
        along = products @ weights
        distances = np.sqrt(np.maximum(norms - 2.0 * along + weights @ along, 0.0))
        inverse = 1.0 / np.maximum(distances, smoothing)
        before, weights = weights, inverse / inverse.sum()
        if (np.abs(weights - before) <= CHANGE_MIN * weights).all():
            break
    return weights

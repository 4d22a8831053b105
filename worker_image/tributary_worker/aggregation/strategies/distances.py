"""Distances between deltas, from their inner products alone."""

from __future__ import annotations

import numpy as np

from tributary_worker.aggregation.numbers import Array


def squared_distances(gram: Array) -> Array:
    """‖d_i - d_j‖² (clients, clients) from <d_i, d_j>; rounding never makes one negative."""
    norms = np.diag(gram)
    return np.maximum(norms[:, None] + norms[None, :] - 2.0 * gram, 0.0)


def given(gram: Array | None) -> Array:
    """The Gram matrix of a strategy that asked for it."""
    if gram is None:
        raise ValueError("this strategy needs the products of the deltas")
    return gram

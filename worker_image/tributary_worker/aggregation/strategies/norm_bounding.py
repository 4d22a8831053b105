"""Norm bounding: no delta counts for more than one of a given length.

Sun, Kairouz, Suresh and McMahan, "Can You Really Backdoor Federated Learning?", 2019 (arXiv:1911.07963):
Σ w_i d_i / max(1, ‖d_i‖ / M). Without an M it is the median of the norms, as in Nguyen et al., "FLAME: Taming
Backdoors in Federated Learning", USENIX Security 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tributary_worker.aggregation.numbers import Array
from tributary_worker.aggregation.strategies.distances import given
from tributary_worker.aggregation.strategies.linear import Linear


@dataclass(frozen=True, slots=True)
class NormBounding(Linear):
    """The mean by declared weight of deltas that are shortened to `bound`; None: to the median norm."""

    bound: float | None

    needs_gram: ClassVar[bool] = True

    def weights(self, declared: Array, gram: Array | None, /) -> Array:
        norms = np.sqrt(np.diag(given(gram)))
        bound = float(np.median(norms)) if self.bound is None else self.bound
        # Multiplied out, so that a delta of length 0 divides nothing.
        shortening = np.where(norms > bound, bound / np.maximum(norms, np.finfo(float).tiny), 1.0)
        return declared / declared.sum() * shortening

"""Krum and Multi-Krum: the deltas that lie closest to their neighbours.

Blanchard, El Mhamdi, Guerraoui and Stainer, "Machine Learning with Adversaries: Byzantine Tolerant Gradient
Descent", NIPS 2017. Needs n >= 2f + 3 deltas for f bad ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tributary_worker.aggregation.numbers import Array
from tributary_worker.aggregation.strategies.distances import given, squared_distances
from tributary_worker.aggregation.strategies.linear import Linear


def scores(gram: Array, byzantine_clients: int) -> Array:
    """s(i) (clients,): the sum of the squared distances to the n - f - 2 nearest others."""
    near = len(gram) - byzantine_clients - 2
    if near < 1:
        raise ValueError(f"Krum needs more than {byzantine_clients + 2} deltas, not {len(gram)}")
    distances = np.sort(squared_distances(gram) + np.diag([np.inf] * len(gram)), axis=1)
    return distances[:, :near].sum(axis=1)


@dataclass(frozen=True, slots=True)
class Krum(Linear):
    """The delta with the smallest score; of equal ones the first by the client's name."""

    byzantine_clients: int

    needs_gram: ClassVar[bool] = True

    def weights(self, declared: Array, gram: Array | None, /) -> Array:
        weights = np.zeros(len(declared))
        weights[np.argmin(scores(given(gram), self.byzantine_clients))] = 1.0
        return weights


@dataclass(frozen=True, slots=True)
class MultiKrum(Linear):
    """The mean of the m = n - f - 2 deltas with the smallest scores.

    The largest m for which the proof holds: Damaskinos et al., "AggregaThor", MLSys 2019. They count
    alike: a declared number would give a bad client among them more weight.
    """

    byzantine_clients: int

    needs_gram: ClassVar[bool] = True

    def weights(self, declared: Array, gram: Array | None, /) -> Array:
        ranking = np.argsort(scores(given(gram), self.byzantine_clients), kind="stable")
        kept = ranking[: len(declared) - self.byzantine_clients - 2]
        weights = np.zeros(len(declared))
        weights[kept] = 1.0 / len(kept)
        return weights

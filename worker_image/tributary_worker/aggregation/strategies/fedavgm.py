"""FedAvgM: momentum at the server.

Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", 2019 (arXiv:1909.06335): v ← β v + Δ and w ← w - η v, where their Δ is old less
new. A delta here is new less old, so the step is +η v.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tributary_worker.aggregation.numbers import Array


@dataclass(frozen=True, slots=True)
class FedAvgM:
    learning_rate: float
    beta: float

    @property
    def slots(self) -> Mapping[str, float]:
        return {"momentum": 0.0}

    def step(self, change: Array, state: Sequence[Array], /) -> tuple[Array, Sequence[Array]]:
        (momentum,) = state
        momentum = self.beta * momentum + change
        return self.learning_rate * momentum, (momentum,)

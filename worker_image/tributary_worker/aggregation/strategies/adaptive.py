"""What FedAdam, FedYogi and FedAdagrad share.

Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2. Δ is the clients' combined change,
new less old, so that the step goes along it:

    m ← β1 m + (1 - β1) Δ        v ← the optimizer's own rule        w ← w + η m / (√v + τ)

τ stands beside the root, not below it, and v starts at τ². The moments are not corrected for their start.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tributary_worker.aggregation.numbers import Array


@dataclass(frozen=True, slots=True)
class Adaptive(ABC):
    learning_rate: float
    beta1: float
    beta2: float
    tau: float

    @property
    def slots(self) -> Mapping[str, float]:
        return {"m": 0.0, "v": self.tau**2}

    @abstractmethod
    def second_moment(self, v: Array, squares: Array) -> Array:
        """The new v from the old one and Δ²."""

    def step(self, change: Array, state: Sequence[Array], /) -> tuple[Array, Sequence[Array]]:
        m, v = state
        m = self.beta1 * m + (1.0 - self.beta1) * change
        v = self.second_moment(v, np.square(change))
        return self.learning_rate * m / (np.sqrt(v) + self.tau), (m, v)

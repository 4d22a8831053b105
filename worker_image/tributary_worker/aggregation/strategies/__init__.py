"""How the deltas of a cohort become one change: the interface of every strategy, and the choice of one.

The streaming core asks a strategy twice. Once for the clients' weights, before any weight of the model is
changed; then, block by block, for the combination of the same elements of all clients. Where the combination
is a weighted sum (`is_linear`) the core adds the deltas itself, one after the other, and never holds two.
A server optimizer then turns the combined change into the step that is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from tributary_api.round import Aggregation, StrategyName
from tributary_worker.aggregation.numbers import Array
from tributary_worker.aggregation.strategies.fedavg import FedAvg


class Strategy(Protocol):
    """Combines what clients sent. Rows are clients, in the order of their names."""

    needs_gram: ClassVar[bool]
    """Whether `weights` wants the Gram matrix of the deltas."""
    is_linear: ClassVar[bool]
    """`combine` is the sum of weight times delta, so the deltas may be added one after the other."""

    def weights(self, declared: Array, gram: Array | None, /) -> Array:
        """Weights (clients,) float64 from the declared ones (clients,) and the products <d_i, d_j>
        (clients, clients) float64; they need not sum to 1."""
        ...

    def combine(self, values: Array, weights: Array, /) -> Array:
        """(clients, elements) float32 to (elements,). Asked only if not `is_linear`."""
        ...


class ServerOptimizer(Protocol):
    """Takes a step along the combined change; elementwise, so that it works on any block of a weight."""

    slots: ClassVar[tuple[str, ...]]
    """Names of the tensors that it keeps from round to round, for example ("momentum",)."""

    def step(self, change: Array, state: Sequence[Array], /) -> tuple[Array, Sequence[Array]]:
        """The step (elements,) to add to the weights, and the new state: one float64 array of the change's
        shape for each slot. The first round's state is zero; between rounds it is rounded to float32."""
        ...


def strategy_for(aggregation: Aggregation) -> Strategy:
    """The strategy that the round asks for."""
    if aggregation.strategy is not StrategyName.FED_AVG:
        raise ValueError(f"no strategy {aggregation.strategy}")
    return FedAvg()


def server_optimizer_for(_aggregation: Aggregation) -> ServerOptimizer | None:
    """The round's server optimizer; None adds the combined change as it is."""
    return None

"""How the deltas of a cohort become one change: the interface of every strategy, and the choice of one.

The streaming core asks a strategy twice. Once for the clients' weights, before any weight of the model is
changed; then, block by block, for the combination of the same elements of all clients. Where the combination
is a weighted sum (`is_linear`) the core adds the deltas itself, one after the other, and never holds two.
A server optimizer then turns the combined change into the step that is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol

import numpy as np

from tributary_api.aggregation import Aggregation, ServerOptimizerName, StrategyName
from tributary_api.failures import Reason
from tributary_worker.aggregation.numbers import Array
from tributary_worker.aggregation.strategies.adaptive import Adaptive
from tributary_worker.aggregation.strategies.fedadagrad import FedAdagrad
from tributary_worker.aggregation.strategies.fedadam import FedAdam
from tributary_worker.aggregation.strategies.fedavg import FedAvg
from tributary_worker.aggregation.strategies.fedavgm import FedAvgM
from tributary_worker.aggregation.strategies.fedyogi import FedYogi
from tributary_worker.aggregation.strategies.geometric_median import GeometricMedian
from tributary_worker.aggregation.strategies.krum import Krum, MultiKrum
from tributary_worker.aggregation.strategies.median import Median
from tributary_worker.aggregation.strategies.norm_bounding import NormBounding
from tributary_worker.aggregation.strategies.trimmed_mean import TrimmedMean
from tributary_worker.failures import StageFailure


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

    @property
    def slots(self) -> Mapping[str, float]:
        """The tensors that it keeps from round to round, by name, with what their elements start from."""
        ...

    def step(self, change: Array, state: Sequence[Array], /) -> tuple[Array, Sequence[Array]]:
        """The step (elements,) to add to the weights, and the new state: one float64 array of the change's
        shape for each slot, in their order. Between rounds the state is rounded to float32."""
        ...


def strategy_for(aggregation: Aggregation) -> Strategy:
    """The strategy that the round asks for."""
    return STRATEGIES[aggregation.strategy](aggregation)


def server_optimizer_for(aggregation: Aggregation) -> ServerOptimizer | None:
    """The round's server optimizer; None adds the combined change as it is."""
    asked = aggregation.server_optimizer
    if asked is None:
        return None
    learning_rate, beta1 = float(asked.learning_rate), float(asked.beta1)
    if asked.name is ServerOptimizerName.FED_AVG_M:
        return FedAvgM(learning_rate, beta1)
    return ADAPTIVE[asked.name](learning_rate, beta1, float(asked.beta2), float(asked.tau))


def require_deltas(aggregation: Aggregation, count: int) -> None:
    """Refuse fewer deltas than the strategy can work with: its result would look sound and not be."""
    if count < aggregation.clients_min:
        raise StageFailure(
            Reason.QUORUM_BROKEN,
            f"{aggregation.strategy} needs {aggregation.clients_min} deltas and {count} are usable: start "
            "another round with more clients, fewer byzantineClients or FedAvg",
        )


def require_weights(declared: Array) -> None:
    """Refuse declared weights that no mean can be taken by."""
    if not (np.isfinite(declared).all() and (declared > 0).all()):
        raise StageFailure(
            Reason.TASK_INVALID, "a client's weight is not a number above 0: change data.numExamples"
        )


def _byzantine_clients(aggregation: Aggregation) -> int:
    if aggregation.byzantine_clients is None:
        raise StageFailure(
            Reason.TASK_INVALID, f"{aggregation.strategy} needs aggregation.byzantineClients: set it"
        )
    return aggregation.byzantine_clients


STRATEGIES: Mapping[StrategyName, Callable[[Aggregation], Strategy]] = {
    StrategyName.FED_AVG: lambda _: FedAvg(),
    StrategyName.NORM_BOUNDING: lambda a: NormBounding(None if a.norm_bound is None else float(a.norm_bound)),
    StrategyName.MEDIAN: lambda _: Median(),
    StrategyName.TRIMMED_MEAN: lambda a: TrimmedMean(_byzantine_clients(a)),
    StrategyName.GEOMETRIC_MEDIAN: lambda _: GeometricMedian(),
    StrategyName.KRUM: lambda a: Krum(_byzantine_clients(a)),
    StrategyName.MULTI_KRUM: lambda a: MultiKrum(_byzantine_clients(a)),
}
ADAPTIVE: Mapping[ServerOptimizerName, type[Adaptive]] = {
    ServerOptimizerName.FED_ADAM: FedAdam,
    ServerOptimizerName.FED_YOGI: FedYogi,
    ServerOptimizerName.FED_ADAGRAD: FedAdagrad,
}

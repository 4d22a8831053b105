"""Strategies and server optimizers against Flower's own, where it has the same rule.

Runs in the benchmark's environment, `.venv-flower/bin/pytest tests/bench_oracles`; skipped elsewhere. Flower
has no geometric median and no norm bounding. It starts v at 0, where the paper says at least τ², and
multiplies FedAdam's learning rate by Adam's correction; both are undone here, so that the rest is compared.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

flower = pytest.importorskip("flwr.serverapp.strategy", reason="Flower is in .venv-flower only")

from flwr.app import Array, ArrayRecord, Message, Metadata, MetricRecord, RecordDict  # noqa: E402

from tributary_api.aggregation import Aggregation  # noqa: E402
from tributary_worker.aggregation.strategies import strategy_for  # noqa: E402
from tributary_worker.aggregation.strategies.fedadagrad import FedAdagrad  # noqa: E402
from tributary_worker.aggregation.strategies.fedadam import FedAdam  # noqa: E402
from tributary_worker.aggregation.strategies.fedavgm import FedAvgM  # noqa: E402
from tributary_worker.aggregation.strategies.fedyogi import FedYogi  # noqa: E402

CLIENTS, ELEMENTS, BYZANTINE = 11, 300, 2
ETA, BETA1, BETA2, TAU = 0.05, 0.9, 0.99, 1e-3
RANDOM = np.random.default_rng(0)
DELTAS = (RANDOM.standard_normal(ELEMENTS) + RANDOM.standard_normal((CLIENTS, ELEMENTS))).astype(np.float32)
EXAMPLES = RANDOM.integers(100, 20000, CLIENTS)


def reply(client: int, values: Any, examples: int) -> Message:
    """A client's reply as Flower's server receives it."""
    content = RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(np.asarray(values, np.float64))}),
            "metrics": MetricRecord({"num-examples": int(examples)}),
        }
    )
    metadata = Metadata(
        run_id=1,
        message_id=str(client),
        src_node_id=client + 1,
        dst_node_id=1,
        reply_to_message_id="",
        group_id="",
        created_at=time.time(),
        ttl=3600.0,
        message_type="train",
    )
    return Message(content=content, metadata=metadata)


def theirs(strategy: Any, values: Any = DELTAS, examples: Any = EXAMPLES, number: int = 1) -> Any:
    replies = [reply(i, v, n) for i, (v, n) in enumerate(zip(values, examples, strict=True))]
    arrays, _ = strategy.aggregate_train(number, replies)
    return arrays["w"].numpy()


def ours(**aggregation: Any) -> Any:
    strategy = strategy_for(Aggregation.model_validate(aggregation))
    wide = DELTAS.astype(np.float64)
    weights = strategy.weights(EXAMPLES.astype(np.float64), wide @ wide.T)
    return weights @ wide if strategy.is_linear else strategy.combine(DELTAS, weights)


def test_fedavg() -> None:
    np.testing.assert_allclose(ours(), theirs(flower.FedAvg()), rtol=1e-12, atol=1e-12)


def test_median() -> None:
    np.testing.assert_allclose(ours(strategy="Median"), theirs(flower.FedMedian()), rtol=1e-12)


def test_trimmed_mean() -> None:
    due = theirs(flower.FedTrimmedAvg(beta=(BYZANTINE + 0.5) / CLIENTS))
    found = ours(strategy="TrimmedMean", byzantineClients=BYZANTINE)
    np.testing.assert_allclose(found, due, rtol=1e-12, atol=1e-12)


def test_krum() -> None:
    due = theirs(flower.Krum(num_malicious_nodes=BYZANTINE))
    np.testing.assert_allclose(ours(strategy="Krum", byzantineClients=BYZANTINE), due, rtol=1e-12)


def test_multi_krum() -> None:
    """Flower weighs the chosen by what they declare; ours count alike."""
    chosen = flower.MultiKrum(num_malicious_nodes=BYZANTINE, num_nodes_to_select=CLIENTS - BYZANTINE - 2)
    due = theirs(chosen, examples=np.ones(CLIENTS))
    found = ours(strategy="MultiKrum", byzantineClients=BYZANTINE)
    np.testing.assert_allclose(found, due, rtol=1e-12, atol=1e-12)


def our_weights(name: str, changes: list[Any]) -> list[Any]:
    """The weights after each round, from zero; v starts where Flower's does."""
    state: Any = [np.zeros(ELEMENTS)] * (1 if name == "FedAvgM" else 2)
    weights, after = np.zeros(ELEMENTS), []
    for number, change in enumerate(changes, start=1):
        correction = np.sqrt(1 - BETA2 ** (number + 1)) / (1 - BETA1 ** (number + 1))
        step, state = {
            "FedAvgM": FedAvgM(ETA, BETA1),
            "FedAdam": FedAdam(ETA * correction, BETA1, BETA2, TAU),
            "FedYogi": FedYogi(ETA, BETA1, BETA2, TAU),
            "FedAdagrad": FedAdagrad(ETA, 0.0, 0.0, TAU),
        }[name].step(change, state)
        weights = weights + step
        after.append(weights)
    return after


def their_optimizer(name: str) -> Any:
    match name:
        case "FedAvgM":
            return flower.FedAvgM(server_learning_rate=ETA, server_momentum=BETA1)
        case "FedAdagrad":
            return flower.FedAdagrad(eta=ETA, tau=TAU)
        case _:
            return getattr(flower, name)(eta=ETA, beta_1=BETA1, beta_2=BETA2, tau=TAU)


@pytest.mark.parametrize("name", ["FedAvgM", "FedAdam", "FedYogi", "FedAdagrad"])
def test_server_optimizers(name: str) -> None:
    changes = list(np.random.default_rng(1).standard_normal((5, ELEMENTS)) * np.logspace(-6, 1, ELEMENTS))
    optimizer, weights = their_optimizer(name), np.zeros(ELEMENTS)
    for number, (change, found) in enumerate(zip(changes, our_weights(name, changes), strict=True), start=1):
        # What `configure_train` notes at the start of a round.
        is_plain = name == "FedAvgM"
        optimizer.current_arrays = ArrayRecord({"w": Array(weights)}) if is_plain else {"w": weights}
        weights = theirs(optimizer, [weights + change], [1], number)
        np.testing.assert_allclose(found, weights, rtol=1e-9, atol=1e-12)

"""Every strategy against a plain float64 version of its definition, on whole vectors; and its laws."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from tributary_api.aggregation import Aggregation
from tributary_api.failures import Reason
from tributary_worker.aggregation.strategies import Strategy, require_deltas, require_weights, strategy_for
from tributary_worker.aggregation.strategies.sorting import merge_exchange, network
from tributary_worker.failures import StageFailure

Array = np.ndarray[Any, np.dtype[Any]]
BYZANTINE = 2
ASKED: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "NormBounding": {},
    "Median": {},
    "TrimmedMean": {"byzantineClients": BYZANTINE},
    "GeometricMedian": {},
    "Krum": {"byzantineClients": BYZANTINE},
    "MultiKrum": {"byzantineClients": BYZANTINE},
}
ROBUST = [name for name in ASKED if name != "FedAvg"]
EVERY = pytest.mark.parametrize("name", ASKED)


def aggregation(name: str, **asked: Any) -> Aggregation:
    return Aggregation.model_validate({"strategy": name, **ASKED.get(name, {}), **asked})


def combined(strategy: Strategy, deltas: Array, declared: Array) -> Array:
    """What the streaming core computes, on whole vectors."""
    wide = deltas.astype(np.float64)
    weights = strategy.weights(declared, wide @ wide.T if strategy.needs_gram else None)
    if strategy.is_linear:
        return sum(w * d for w, d in zip(weights, wide, strict=True))
    return strategy.combine(deltas, weights)


def change(name: str, deltas: Array, declared: Array, **asked: Any) -> Array:
    return combined(strategy_for(aggregation(name, **asked)), deltas, declared)


def a_cohort(seed: int, clients: int = 9, elements: int = 40) -> tuple[Array, Array]:
    """Deltas (clients, elements) float32 around a common direction, and declared weights."""
    random = np.random.default_rng(seed)
    deltas = random.standard_normal(elements) + random.standard_normal((clients, elements))
    return deltas.astype(np.float32), random.integers(100, 20000, clients).astype(np.float64)


# The definitions, written down plainly.


def plain_fedavg(deltas: Array, declared: Array) -> Array:
    return np.average(deltas.astype(np.float64), axis=0, weights=declared)


def plain_norm_bounding(deltas: Array, declared: Array) -> Array:
    norms = [np.linalg.norm(d.astype(np.float64)) for d in deltas]
    bound = np.median(norms)
    bounded = [d / max(1.0, n / bound) for d, n in zip(deltas.astype(np.float64), norms, strict=True)]
    return np.average(bounded, axis=0, weights=declared)


def plain_median(deltas: Array, _: Array) -> Array:
    return np.median(deltas.astype(np.float64), axis=0)


def plain_trimmed_mean(deltas: Array, _: Array) -> Array:
    return np.sort(deltas.astype(np.float64), axis=0)[BYZANTINE:-BYZANTINE].mean(axis=0)


def plain_geometric_median(deltas: Array, _: Array) -> Array:
    wide = deltas.astype(np.float64)

    def cost(point: Array) -> tuple[float, Array]:
        away = point - wide
        distances = np.linalg.norm(away, axis=1)
        return distances.sum(), (away / distances[:, None]).sum(axis=0)

    return minimize(cost, wide.mean(axis=0), jac=True, method="BFGS", options={"gtol": 1e-9}).x


def plain_krum_ranking(deltas: Array) -> Array:
    wide, clients = deltas.astype(np.float64), len(deltas)
    scores = []
    for i in range(clients):
        distances = sorted(np.sum((wide[i] - wide[j]) ** 2) for j in range(clients) if j != i)
        scores.append(sum(distances[: clients - BYZANTINE - 2]))
    return np.argsort(scores)


def plain_krum(deltas: Array, _: Array) -> Array:
    return deltas[plain_krum_ranking(deltas)[0]].astype(np.float64)


def plain_multi_krum(deltas: Array, _: Array) -> Array:
    kept = plain_krum_ranking(deltas)[: len(deltas) - BYZANTINE - 2]
    return deltas[kept].astype(np.float64).mean(axis=0)


PLAIN = {
    "FedAvg": plain_fedavg,
    "NormBounding": plain_norm_bounding,
    "Median": plain_median,
    "TrimmedMean": plain_trimmed_mean,
    "GeometricMedian": plain_geometric_median,
    "Krum": plain_krum,
    "MultiKrum": plain_multi_krum,
}


@EVERY
@pytest.mark.parametrize("clients", [7, 8, 16, 33])
def test_it_is_what_its_definition_says(name: str, clients: int) -> None:
    deltas, declared = a_cohort(clients, clients)
    # BFGS stops where the gradient is 1e-9 or the cost no longer changes.
    tolerance = 1e-5 if name == "GeometricMedian" else 1e-12
    np.testing.assert_allclose(
        change(name, deltas, declared), PLAIN[name](deltas, declared), rtol=0, atol=tolerance
    )


@EVERY
@given(seed=st.integers(0, 2**32), clients=st.integers(7, 20))
@settings(max_examples=25, deadline=None)
def test_the_order_of_clients_does_not_matter(name: str, seed: int, clients: int) -> None:
    deltas, declared = a_cohort(seed, clients)
    order = np.random.default_rng(seed).permutation(clients)
    there, here = change(name, deltas, declared), change(name, deltas[order], declared[order])
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-9)


@EVERY
@given(seed=st.integers(0, 2**32), exponent=st.integers(-20, 20))
@settings(max_examples=25, deadline=None)
def test_scaled_deltas_give_a_scaled_change(name: str, seed: int, exponent: int) -> None:
    deltas, declared = a_cohort(seed)
    factor = np.float32(2.0**exponent)
    scaled = change(name, factor * deltas, declared)
    np.testing.assert_allclose(scaled / factor, change(name, deltas, declared), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in ASKED if n != "NormBounding"])
@given(seed=st.integers(0, 2**32))
@settings(max_examples=25, deadline=None)
def test_shifted_deltas_give_a_shifted_change(name: str, seed: int) -> None:
    """Not so for norm bounding, which pulls towards no change."""
    deltas, declared = a_cohort(seed)
    deltas = np.round(deltas * 256) / 256  # so that the shift is exact in float32
    shift = np.float32(3.0)
    shifted = change(name, deltas + shift, declared) - shift
    np.testing.assert_allclose(shifted, change(name, deltas, declared), rtol=0, atol=1e-7)


@EVERY
def test_equal_deltas_are_the_change(name: str) -> None:
    delta = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    result = change(name, np.tile(delta, (7, 1)), np.arange(1.0, 8.0))
    np.testing.assert_allclose(result, delta, rtol=1e-12)


@EVERY
def test_deltas_of_zeros_change_nothing(name: str) -> None:
    assert not change(name, np.zeros((7, 5), np.float32), np.ones(7)).any()


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("size", [1e2, 1e9, 1e18])
def test_bad_clients_move_a_robust_change_no_further_than_good_ones_lie(name: str, size: float) -> None:
    deltas, _ = a_cohort(1, clients=11, elements=30)
    good = deltas[BYZANTINE:].astype(np.float64)
    attack = np.random.default_rng(2).standard_normal((BYZANTINE, 30))
    deltas[:BYZANTINE] = size * attack
    reach = np.linalg.norm(good - good.mean(axis=0), axis=1).max()
    if name == "NormBounding":  # it bounds the length alone
        reach = 2 * np.linalg.norm(good, axis=1).max()
    assert np.linalg.norm(change(name, deltas, np.ones(11)) - good.mean(axis=0)) <= reach
    assert np.linalg.norm(change("FedAvg", deltas, np.ones(11)) - good.mean(axis=0)) > reach


@pytest.mark.parametrize("name", [n for n in ROBUST if n != "NormBounding"])
def test_a_declared_number_buys_no_influence(name: str) -> None:
    deltas, declared = a_cohort(3)
    bought = declared.copy()
    bought[0] *= 1e6
    np.testing.assert_array_equal(change(name, deltas, declared), change(name, deltas, bought))


def test_a_bound_of_its_own_shortens_what_is_longer_and_nothing_else() -> None:
    deltas = np.array([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], np.float32)
    result = change("NormBounding", deltas, np.ones(3), normBound="1")
    np.testing.assert_allclose(result, np.array([0.6 + 0.3, 0.8 + 0.4]) / 3, rtol=1e-7)


def test_the_geometric_median_of_a_majority_at_one_point_is_that_point() -> None:
    random = np.random.default_rng(4)
    deltas = random.standard_normal((9, 20)).astype(np.float32)
    deltas[2:7] = deltas[2]
    np.testing.assert_array_equal(change("GeometricMedian", deltas, np.ones(9)), deltas[2])


def test_the_geometric_median_may_be_a_delta_itself() -> None:
    """There the cost has a kink: the derivative is no help, and Weiszfeld's iteration as it was published
    divides by zero."""
    corners = np.array([[1, 0], [-1, 0], [0, 1], [0, -1], [0, 0]], np.float32)
    np.testing.assert_allclose(change("GeometricMedian", corners, np.ones(5)), [0, 0], atol=1e-9)


def test_however_long_a_delta_is_it_pulls_the_geometric_median_with_the_force_of_one() -> None:
    """Six corners at distance r of their mean, and one delta far away at a right angle to all of them: at the
    median, t off the mean towards it, 6 t / √(r² + t²) = 1."""
    deltas = np.eye(7, dtype=np.float32)
    deltas[6] *= 1e18
    result = change("GeometricMedian", deltas, np.ones(7))
    np.testing.assert_allclose(result[:6], 1 / 6, rtol=1e-6)
    assert result[6] == pytest.approx(np.sqrt((1 - 1 / 6) / 35), rel=1e-5)


@pytest.mark.parametrize("rows", range(1, 18))
def test_the_network_sorts_every_sequence_of_zeros_and_ones(rows: int) -> None:
    """Then it sorts every sequence (Knuth, volume 3, section 5.3.4, theorem Z)."""
    patterns = np.array(
        np.meshgrid(*[[0, 1]] * rows)
        if rows <= 10
        else np.random.default_rng(rows).integers(0, 2, (rows, 5000))
    ).reshape(rows, -1)
    for low, high in merge_exchange(rows):
        patterns[low], patterns[high] = patterns[[low, high]].min(axis=0), patterns[[low, high]].max(axis=0)
    assert all((a <= b).all() for a, b in pairwise(patterns))


def test_what_a_median_does_not_depend_on_is_not_compared() -> None:
    assert len(network(16, (7, 8))) < len(list(merge_exchange(16)))


def test_the_block_size_of_the_ranking_does_not_matter() -> None:
    deltas, declared = a_cohort(5, clients=8, elements=3 * (1 << 14) + 17)
    before = deltas.copy()
    np.testing.assert_array_equal(change("Median", deltas, declared), plain_median(deltas, declared))
    np.testing.assert_array_equal(deltas, before)


@pytest.mark.parametrize(
    ("name", "clients_min"),
    [
        ("FedAvg", 1),
        ("NormBounding", 3),
        ("Median", 3),
        ("GeometricMedian", 3),
        ("TrimmedMean", 5),
        ("Krum", 7),
    ],
)
def test_too_few_deltas_are_refused(name: str, clients_min: int) -> None:
    require_deltas(aggregation(name), clients_min)
    with pytest.raises(StageFailure, match=f"{name} needs {clients_min} deltas") as refused:
        require_deltas(aggregation(name), clients_min - 1)
    assert refused.value.reason is Reason.QUORUM_BROKEN


@pytest.mark.parametrize("name", ["TrimmedMean", "Krum", "MultiKrum"])
def test_a_strategy_is_told_how_many_clients_may_be_bad(name: str) -> None:
    with pytest.raises(StageFailure, match="needs aggregation"):
        strategy_for(aggregation(name, byzantineClients=None))


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_weights_that_no_mean_can_be_taken_by_are_refused(bad: float) -> None:
    with pytest.raises(StageFailure, match="not a number above 0"):
        require_weights(np.array([1.0, bad]))


@pytest.mark.parametrize(
    ("name", "variance"),
    [
        ("FedAvg", 1.0),
        ("NormBounding", 1.0),
        ("GeometricMedian", 1.0),
        ("TrimmedMean", 1.14),
        ("Median", 1.38),
        ("MultiKrum", 10 / 6),
        ("Krum", 10.0),
    ],
)
def test_what_a_strategy_costs_where_deltas_are_noise(name: str, variance: float) -> None:
    """Variance of the change of ten clients over that of their mean, as docs/aggregation.md states it."""
    noise = np.random.default_rng(6).standard_normal((10, 1 << 16)).astype(np.float32)
    found = np.var(change(name, noise, np.ones(10))) / np.var(noise.mean(axis=0))
    assert found == pytest.approx(variance, rel=0.02)

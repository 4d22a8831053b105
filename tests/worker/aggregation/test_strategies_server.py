"""Server optimizers against a plain version of the papers' algorithms, one number at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from tributary_api.aggregation import Aggregation
from tributary_worker.aggregation.strategies import ServerOptimizer, server_optimizer_for

ADAPTIVE = ("FedAdam", "FedYogi", "FedAdagrad")
EVERY = pytest.mark.parametrize("name", ["FedAvgM", *ADAPTIVE])
LEARNING_RATE, BETA1, BETA2, TAU = 0.03, 0.8, 0.95, 0.002

Array = np.ndarray[Any, np.dtype[Any]]


def optimizer(name: str) -> ServerOptimizer:
    asked = {"name": name, "learningRate": "0.03", "beta1": "0.8", "beta2": "0.95", "tau": "2e-3"}
    found = server_optimizer_for(Aggregation.model_validate({"serverOptimizer": asked}))
    assert found is not None
    return found


def steps(chosen: ServerOptimizer, changes: Sequence[Array]) -> list[Array]:
    """The step of each round, the state going on from round to round."""
    state: Sequence[Array] = [np.full(changes[0].shape, start) for start in chosen.slots.values()]
    taken = []
    for change in changes:
        step, state = chosen.step(change, state)
        assert len(state) == len(chosen.slots)
        taken.append(step)
    return taken


def plain(name: str, changes: Sequence[float]) -> list[float]:
    """Hsu et al. 2019 with the sign of a delta; Reddi et al. 2021, algorithm 2, lines 11 to 15."""
    m, v, taken = 0.0, TAU**2, []
    for change in changes:
        if name == "FedAvgM":
            m = BETA1 * m + change
            taken.append(LEARNING_RATE * m)
            continue
        m = BETA1 * m + (1 - BETA1) * change
        if name == "FedAdam":
            v = BETA2 * v + (1 - BETA2) * change**2
        if name == "FedYogi":
            v = v - (1 - BETA2) * change**2 * ((v > change**2) - (v < change**2))
        if name == "FedAdagrad":
            v = v + change**2
        taken.append(LEARNING_RATE * m / (math.sqrt(v) + TAU))
    return taken


@EVERY
def test_it_is_what_the_paper_says(name: str) -> None:
    changes = np.random.default_rng(0).standard_normal((12, 50)) * 10.0 ** np.linspace(-5, 1, 50)
    taken = steps(optimizer(name), list(changes))
    for element in range(50):
        due = plain(name, [float(c) for c in changes[:, element]])
        np.testing.assert_allclose([t[element] for t in taken], due, rtol=1e-12)


@EVERY
def test_the_step_goes_along_the_change(name: str) -> None:
    change = np.array([0.5, -0.001, 0.0])
    (step,) = steps(optimizer(name), [change])
    np.testing.assert_array_equal(np.sign(step), np.sign(change))


@EVERY
def test_any_block_of_a_weight_can_be_stepped_alone(name: str) -> None:
    changes = list(np.random.default_rng(1).standard_normal((3, 40)))
    whole = steps(optimizer(name), changes)
    parts = [steps(optimizer(name), [c[block] for c in changes]) for block in (slice(0, 7), slice(7, 40))]
    for at, step in enumerate(whole):
        np.testing.assert_array_equal(np.concatenate([part[at] for part in parts]), step)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_size_of_a_step_is_bounded_whatever_the_change(name: str) -> None:
    """By η / √(1 - β2): m is a mean of past changes, and each lies below √(v / (1 - β2)) when it comes."""
    huge = [np.array([10.0**6, -(10.0**-6)])] * 20
    bound = LEARNING_RATE / math.sqrt(1 - BETA2)
    assert all((np.abs(step) <= bound).all() for step in steps(optimizer(name), huge))


@pytest.mark.parametrize("name", ADAPTIVE)
def test_tau_is_what_a_small_change_is_measured_against(name: str) -> None:
    """Far below τ the step is proportional to the change: it stands beside the root, and v starts at τ²."""
    (step,) = steps(optimizer(name), [np.array([1e-9])])
    v = TAU**2 * (BETA2 if name == "FedAdam" else 1.0)
    assert step[0] == pytest.approx(LEARNING_RATE * (1 - BETA1) * 1e-9 / (math.sqrt(v) + TAU), rel=1e-6)


def test_fedavgm_without_memory_and_with_rate_1_is_fedavg() -> None:
    asked = {"name": "FedAvgM", "learningRate": "1", "beta1": "0"}
    chosen = server_optimizer_for(Aggregation.model_validate({"serverOptimizer": asked}))
    assert chosen is not None
    changes = list(np.random.default_rng(2).standard_normal((4, 9)))
    np.testing.assert_array_equal(steps(chosen, changes), changes)


def test_a_round_that_asks_for_none_has_none() -> None:
    assert server_optimizer_for(Aggregation()) is None

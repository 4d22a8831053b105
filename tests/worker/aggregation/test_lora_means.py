"""What the mean of adapters costs when its factors are averaged apart, and that ours costs nothing.

A client's change of a weight is s·BᵢAᵢ. Averaging B and A apart gives s·mean(B)·mean(A), which is another
matrix: it lacks the covariance of B and A over clients. Errors are ‖found − exact‖ / ‖exact‖ over all weights
(Frobenius), with `exact` the weighted mean of the products in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from aggregation_worlds import FROZEN, SCALE, TRAINED_A, Round, a_round, tensors_of

from tributary_worker import lora

Array = np.ndarray[Any, np.dtype[Any]]
ROUNDING = 3e-6
"""A change is read off as the difference of two float32 weights some ten times as large."""


def a_tiny_round(directory: Path, method: Mapping[str, Any]) -> Round:
    model = tiny_models.llama()
    names = lora.target_names(model, lora.LoraSettings(3, 6.0))
    modules = {name: lora.features(model.get_submodule(name)) for name in names}
    return a_round(tiny_models.save(model, directory / "base"), modules, method, clients=4)


def factors(made: Round, module: str) -> list[tuple[float, Array, Array]]:
    """(share, B, A) of each client, float64."""
    total = sum(made.weights.values())
    name = f"base_model.model.{module}.lora_{{}}.weight".format
    return [
        (weight / total, *(made.deltas[client][name(factor)].astype(np.float64) for factor in "BA"))
        for client, weight in made.weights.items()
    ]


def exact(made: Round, module: str) -> Array:
    return SCALE * sum(share * b @ a for share, b, a in factors(made, module))


def naive(made: Round, module: str) -> Array:
    """mean(B) · mean(A)."""
    parts = factors(made, module)
    return SCALE * sum(share * b for share, b, _ in parts) @ sum(share * a for share, _, a in parts)


def ours(made: Round, directory: Path) -> Callable[[Round, str], Array]:
    new, old = tensors_of(made.result(directory)), tensors_of(made.base_directory)
    return lambda _, module: new[f"{module}.weight"].astype(np.float64) - old[f"{module}.weight"]


def error(made: Round, change: Callable[[Round, str], Array]) -> float:
    wrong = sum(np.sum((change(made, m) - exact(made, m)) ** 2) for m in made.modules)
    return float(np.sqrt(wrong / sum(np.sum(exact(made, m) ** 2) for m in made.modules)))


def drifted(made: Round, drift: float) -> Round:
    """The same round, whose A's have moved from a common start by this part of its size, as a training does
    to them: one client alone says too little about the others."""
    random = np.random.default_rng(1)
    start = {n: random.standard_normal(t.shape) for n, t in made.deltas["a"].items() if "lora_A" in n}
    for client, delta in made.deltas.items():
        for name, common in start.items():
            moved = common + drift * random.standard_normal(common.shape)
            delta[name] = (0.05 * moved).astype(np.float32)
        made.publish(client)
    return made


def test_with_a_frozen_even_the_mean_of_b_is_exact(tmp_path: Path) -> None:
    made = a_tiny_round(tmp_path, FROZEN)
    assert error(made, naive) < 1e-12
    assert error(made, ours(made, tmp_path)) < ROUNDING


@pytest.mark.parametrize(("drift", "naive_error"), [(0.1, 0.05), (0.5, 0.25), (2.0, 0.5)])
def test_with_a_trained_the_naive_mean_is_wrong_and_ours_is_exact(
    tmp_path: Path, drift: float, naive_error: float
) -> None:
    made = drifted(a_tiny_round(tmp_path, TRAINED_A), drift)
    wrong, found = error(made, naive), error(made, ours(made, tmp_path))
    print(
        f"A moved by {drift:g} of its size: mean(B)·mean(A) is off by {wrong:.2g}, the aggregator {found:.1g}"
    )
    assert wrong > naive_error
    assert found < ROUNDING

"""FedProx on the client (Li et al. 2020, equation 2) under DP: h(w) = F(w) + μ/2 · ‖w − w_start‖².

The pull μ (w − w_start) depends on noised values alone. So it is added after clipping, averaging and noise:
were it clipped with the records' gradients it would take from their share of C, and were it divided by qN it
would be as good as absent. Checked against plain NumPy on the gradient that the engine hands over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import private_engines as engines
import pytest
import torch

from tributary_worker.privacy.engine import ADAM_BETAS, SGD_MOMENTUM

pytestmark = pytest.mark.usefixtures("alone")
LEARNING_RATE, MU, STEPS, TOLERANCE = 0.01, 30.0, 3, 1e-5
"""The learning rate is that of `private_engines`."""
Array = np.ndarray[Any, np.dtype[Any]]


def flat(model: torch.nn.Module) -> Array:
    trained = [p.detach().numpy().ravel() for p in model.parameters() if p.requires_grad]
    return np.concatenate(trained).astype(np.float64)


def plain_sgd() -> Callable[[Array], Array]:
    """Gradient to step, with momentum."""
    buffer: Any = 0.0

    def step(gradient: Array) -> Array:
        nonlocal buffer
        buffer = SGD_MOMENTUM * buffer + gradient
        return -LEARNING_RATE * buffer

    return step


def plain_adam() -> Callable[[Array], Array]:
    m: Any = 0.0
    v: Any = 0.0
    count = 0

    def step(gradient: Array) -> Array:
        nonlocal m, v, count
        count += 1
        m = ADAM_BETAS[0] * m + (1 - ADAM_BETAS[0]) * gradient
        v = ADAM_BETAS[1] * v + (1 - ADAM_BETAS[1]) * gradient**2
        corrected = m / (1 - ADAM_BETAS[0] ** count), v / (1 - ADAM_BETAS[1] ** count)
        return -LEARNING_RATE * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)

    return step


@pytest.mark.parametrize("zero_stage", [0, 2])
@pytest.mark.parametrize(("optimizer", "plain"), [("SGD", plain_sgd), ("AdamW", plain_adam)])
def test_the_pull_is_added_whole_to_the_noised_mean(
    optimizer: str, plain: Callable[[], Callable[[Array], Array]], zero_stage: int
) -> None:
    data, model = engines.data_set(), engines.adapted_gpt2(freeze_a=False)
    private = engines.engine(model, optimizer=optimizer, proximal_mu=MU, zero_stage=zero_stage)
    weights = start = flat(model)
    update = plain()
    for step in range(STEPS):
        noised = engines.received(private, data, step).numpy().astype(np.float64)
        private.train_step(step, lambda indices: engines.load(data, list(indices)))
        weights = weights + update(noised + MU * (weights - start))
        np.testing.assert_allclose(flat(model), weights, rtol=0, atol=TOLERANCE)
    moved = LEARNING_RATE * MU * np.abs(weights - start).max()
    assert moved > 20 * TOLERANCE, "else a pull that is not there would not be missed"


def test_what_the_records_may_contribute_does_not_depend_on_the_pull() -> None:
    """The gradient that is clipped, summed and noised is the same, however far the weights have gone."""
    data = engines.data_set()
    free, held = (engines.engine(engines.adapted_gpt2(), proximal_mu=mu) for mu in (0.0, 1e6))
    away = torch.randn(sum(p.numel() for p in free.optimizer.param_groups[0]["params"]))
    for private in (free, held):
        place = 0
        for parameter in private.optimizer.param_groups[0]["params"]:
            parameter.data += away[place : place + parameter.numel()].view_as(parameter)
            place += parameter.numel()
    torch.testing.assert_close(*(engines.received(e, data, 0) for e in (free, held)), rtol=0, atol=0)

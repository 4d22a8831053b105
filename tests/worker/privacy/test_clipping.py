from __future__ import annotations

import numpy as np
import pytest
import torch

from tributary_worker.privacy.clipping import add_clipped, clip_factors, per_example_norms
from tributary_worker.privacy.parts import Dense

SHAPES = ((3, 4), (7,), (2, 5))
PAIRS = 1200


def gradients(generator, batch):
    """Per-example gradients of wildly different scales, some of them broken."""
    scales = torch.from_numpy(10.0 ** generator.uniform(-6, 6, size=batch))
    tensors = [
        (
            torch.from_numpy(generator.normal(size=(batch, *shape))) * scales.view(-1, *[1] * len(shape))
        ).float()
        for shape in SHAPES
    ]
    for row in range(batch):
        if generator.random() < 0.3:
            broken = (float("nan"), float("inf"), -float("inf"))[generator.integers(3)]
            tensors[generator.integers(len(tensors))][row].view(-1)[0] = broken
    return tensors


def clip(gradients, max_grad_norm, weights):
    """The clipped sums of gradients (batch, *shape)."""
    totals = [torch.zeros(g.shape[1:]) for g in gradients]
    add_clipped([[Dense(g)] for g in gradients], max_grad_norm, weights, totals)
    return totals


def flat(tensors):
    return torch.cat([t.double().flatten() for t in tensors])


def test_one_record_moves_the_sum_by_no_more_than_the_clipping_norm():
    generator = np.random.default_rng(0)
    for _ in range(PAIRS):
        batch = int(generator.integers(1, 6))
        limit = float(10.0 ** generator.uniform(-3, 1))
        all_records = gradients(generator, batch)
        weights = torch.ones(batch)
        weights[int(generator.integers(batch))] = 0
        moved = flat(clip(all_records, limit, torch.ones(batch))) - flat(clip(all_records, limit, weights))
        # One float32 rounding of a sum of norm at most batch * C comes on top.
        assert float(moved.norm()) <= limit * (1 + 1e-6) + batch * limit * 2**-23


def test_a_single_record_never_exceeds_the_clipping_norm():
    generator = np.random.default_rng(1)
    for _ in range(PAIRS):
        limit = float(10.0 ** generator.uniform(-3, 1))
        assert float(flat(clip(gradients(generator, 1), limit, torch.ones(1))).norm()) <= limit * (1 + 1e-6)


def test_small_gradients_pass_unchanged_and_large_ones_keep_their_direction():
    small, large = torch.tensor([[0.3, 0.4]]), torch.tensor([[30.0, 40.0]])
    assert torch.equal(clip([small], 1.0, torch.ones(1))[0], small[0])
    assert torch.allclose(clip([large], 1.0, torch.ones(1))[0], torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_record_without_a_finite_norm_contributes_exactly_nothing(broken):
    good = torch.tensor([[0.1, 0.2], [broken, broken]])
    assert torch.equal(clip([good, good], 1.0, torch.ones(2))[0], torch.tensor([0.1, 0.2]))


def test_an_empty_slot_contributes_exactly_nothing():
    gradients = [torch.tensor([[0.1, 0.2], [0.3, 0.4], [float("nan"), 5.0]])]
    clipped = clip(gradients, 1.0, torch.tensor([1.0, 0.0, 0.0]))
    assert torch.equal(clipped[0], torch.tensor([0.1, 0.2]))


def test_a_record_of_the_largest_finite_numbers_is_clipped_like_any_other():
    clipped = clip([torch.full((1, 4), 3e38)], 2.0, torch.ones(1))[0]
    assert torch.allclose(clipped, torch.ones(4))


def test_factors():
    norms = torch.tensor([0.0, 0.5, 1.0, 4.0, float("nan"), float("inf")], dtype=torch.float64)
    assert clip_factors(norms, 1.0).tolist() == [1.0, 1.0, 1.0, 0.25, 0.0, 0.0]


def test_the_norm_is_over_all_parameters_together():
    assert (
        float(per_example_norms([[Dense(torch.tensor([[3.0]]))], [Dense(torch.tensor([[[4.0]]]))]])[0]) == 5.0
    )

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tributary_accounting.mechanism import dp_sgd
from tributary_worker.privacy.sampler import EMPTY, PoissonSampler, micro_batches_per_rank

KEY = bytes(range(32))
ALPHA = 1e-6


def sampler(num_examples=200, batch=20, key=KEY):
    return PoissonSampler(dp_sgd(num_examples, batch, 1, 1.0, 1.0), key)


@settings(deadline=None)
@given(st.integers(1, 300), st.data(), st.integers(1, 4), st.integers(1, 9), st.integers(0, 2**40))
def test_each_record_of_a_step_has_one_slot_on_one_rank_and_shapes_are_public(n, data, world, micro, step):
    batch = data.draw(st.integers(1, n))
    mechanism = dp_sgd(n, batch, 1, 1.0, 1.0)
    draw = PoissonSampler(mechanism, KEY)
    shares = [draw.micro_batches(step, rank, world, micro) for rank in range(world)]
    shape = (micro_batches_per_rank(mechanism.batch_cap, world, micro), micro)
    assert all(share.shape == shape for share in shares)
    slots = np.concatenate([share.ravel() for share in shares])
    assert np.array_equal(np.sort(slots[slots != EMPTY]), draw.records(step))
    assert len(draw.records(step)) <= mechanism.batch_cap


def test_every_record_is_as_likely_as_the_accountant_says():
    steps, draw = 20_000, sampler()
    counts = np.zeros(200)
    sizes = np.array([_count(draw, step, counts) for step in range(steps)])
    expected = steps * 0.1
    chi_square = ((counts - expected) ** 2 / (expected * 0.9)).sum()
    assert ALPHA < stats.chi2(200).cdf(chi_square) < 1 - ALPHA
    assert sizes.mean() == pytest.approx(20, abs=5 * np.sqrt(18 / steps))
    assert sizes.var() == pytest.approx(18, rel=0.06)


def _count(draw, step, counts):
    records = draw.records(step)
    counts[records] += 1
    return len(records)


def test_records_and_steps_are_independent():
    steps, draw = 4000, sampler(num_examples=30, batch=6)
    drawn = np.zeros((steps, 30))
    for step in range(steps):
        drawn[step, draw.records(step)] = 1
    between_records = np.corrcoef(drawn.T) - np.eye(30)
    between_steps = np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]
    assert np.abs(between_records).max() < 5.5 / np.sqrt(steps)
    assert abs(between_steps) < 5.5 / np.sqrt(steps * 30)


def test_a_sample_above_the_cap_keeps_a_uniform_part_of_it():
    mechanism = dp_sgd(40, 20, 1, 1.0, 1.0).model_copy(update={"batch_cap": 5})
    draw, steps = PoissonSampler(mechanism, KEY), 8000
    counts = np.zeros(40)
    sizes = {_count(draw, step, counts) for step in range(steps)}
    assert sizes == {5}
    expected = steps * 5 / 40
    assert ((counts - expected) ** 2 / expected).sum() < stats.chi2(39).ppf(1 - ALPHA)


def test_a_whole_batch_takes_every_record():
    assert np.array_equal(sampler(num_examples=7, batch=7).records(3), np.arange(7))


def test_another_key_is_another_sample():
    assert not np.array_equal(sampler().records(0), sampler(key=bytes(32)).records(0))

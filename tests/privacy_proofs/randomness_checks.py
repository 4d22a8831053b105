"""What the sampler and the keys must do, as functions of how they are made: 4.4 and 4.5 of the
specification."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from privacy_proofs.statistics import ALPHA, DEVIATIONS, is_uncorrelated
from scipy import stats

from tributary_accounting.mechanism import dp_sgd
from tributary_api.records import MechanismSpec
from tributary_worker.privacy.sampler import EMPTY, PoissonSampler

MakeSampler = Callable[[MechanismSpec, bytes], PoissonSampler]
DeriveKey = Callable[[bytes, str, str, Any], bytes]

KEY = bytes(range(32))
NUM_EXAMPLES, BATCH, STEPS = 60, 12, 6000


def drawn(make: MakeSampler, mechanism: MechanismSpec, steps: int) -> np.ndarray:
    """Which record takes part in which step: (steps, records) of 0 and 1."""
    sampler, table = make(mechanism, KEY), np.zeros((steps, mechanism.num_examples))
    for step in range(steps):
        table[step, sampler.records(step)] = 1
    return table


def check_inclusion_frequency(make: MakeSampler) -> None:
    """4.5: every record takes part with probability q, and the batch size varies as a binomial one."""
    table, q = drawn(make, dp_sgd(NUM_EXAMPLES, BATCH, 1, 1.0, 1.0), STEPS), BATCH / NUM_EXAMPLES
    expected = STEPS * q
    chi_square = ((table.sum(0) - expected) ** 2 / (expected * (1 - q))).sum()
    assert ALPHA < stats.chi2(NUM_EXAMPLES).cdf(chi_square) < 1 - ALPHA, "records are not drawn with chance q"
    variance = table.sum(1).var() / (BATCH * (1 - q))
    assert abs(variance - 1) < DEVIATIONS * np.sqrt(2 / STEPS), (
        f"batch sizes vary {variance:.2f} times as due"
    )


def check_independent_draws(make: MakeSampler) -> None:
    """4.5: neither another record nor an earlier step says anything about who is drawn."""
    table = drawn(make, dp_sgd(NUM_EXAMPLES, BATCH, 1, 1.0, 1.0), STEPS)
    between_records = np.corrcoef(table.T) - np.eye(NUM_EXAMPLES)
    assert np.abs(between_records).max() < (DEVIATIONS + 0.5) / np.sqrt(STEPS), "records are drawn together"
    for lag in range(1, 2 * NUM_EXAMPLES // BATCH):
        assert is_uncorrelated(table[:-lag], table[lag:]), f"a step tells who is drawn {lag} steps later"


def check_batch_cap(make: MakeSampler) -> None:
    """4.5: no step has more than B_max records; of a larger sample a uniformly random part stays."""
    cap = 5
    mechanism = dp_sgd(40, 20, 1, 1.0, 1.0).model_copy(update={"batch_cap": cap})
    table = drawn(make, mechanism, 4000)
    assert table.sum(1).max() <= cap, f"a step has {table.sum(1).max():.0f} records, the cap is {cap}"
    expected = 4000 * cap / 40
    chi_square = ((table.sum(0) - expected) ** 2 / expected).sum()
    assert chi_square < stats.chi2(39).ppf(1 - ALPHA), "the cap prefers some records"


def check_public_shapes(make: MakeSampler) -> None:
    """4.2: the number of micro-batches is the same in every step and on every rank, and each record has one
    slot."""
    mechanism = dp_sgd(NUM_EXAMPLES, BATCH, 1, 1.0, 1.0)
    sampler = make(mechanism, KEY)
    shapes = set()
    for step in range(50):
        shares = [sampler.micro_batches(step, rank, 3, 4) for rank in range(3)]
        shapes |= {share.shape for share in shares}
        slots = np.concatenate([share.ravel() for share in shares])
        assert np.array_equal(np.sort(slots[slots != EMPTY]), sampler.records(step)), "a record has no slot"
    assert len(shapes) == 1, f"micro-batches come in {sorted(shapes)}"


def check_keys_belong_to_one_computation(derive: DeriveKey) -> None:
    """2: a retry of the same computation on the same data has the same randomness, and nothing else has."""
    tenants, hashes = (bytes(32), bytes([1]) * 32), ("aa" * 32, "bb" * 32)
    purposes = ("sampling", "noise")
    cases = [(t, c, s, p) for t in tenants for c in hashes for s in hashes for p in purposes]
    assert len({derive(*case) for case in cases}) == len(cases), "two computations share their randomness"
    assert all(derive(*case) == derive(*case) for case in cases), "a retry would publish a second delta"

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tributary_worker.privacy.keystream import Keystream, derive_key
from tributary_worker.privacy.noise import GRID_BITS, GaussianNoise

KEY = bytes(range(32))
ALPHA = 1e-6
"""Of each statistical test. Keys are fixed, so a test that passes today passes for ever."""


@given(st.integers(0, 300), st.integers(0, 70), st.integers(0, 2**62))
def test_any_word_is_reached_without_those_before_it(start, count, stream):
    keystream = Keystream(KEY)
    whole = keystream.words(stream, 0, start + count)
    assert np.array_equal(keystream.words(stream, start, count), whole[start:])


@given(st.integers(0, 200_000), st.integers(0, 50), st.integers(0, 50))
def test_noise_depends_on_the_element_and_not_on_who_asks(start, left, right):
    noise = GaussianNoise(KEY, 2.0)
    whole = noise.draw(7, start, start + left + right)
    assert np.array_equal(noise.draw(7, start, start + left), whole[:left])
    assert np.array_equal(noise.draw(7, start + left, start + left + right), whole[left:])


def test_noise_is_gaussian_with_the_standard_deviation_that_is_due():
    std = 0.037
    received = GaussianNoise(KEY, std).add(np.zeros(1_000_000, dtype=np.float32), step=3, start=123)
    assert received.std() == pytest.approx(std, rel=0.005)
    assert abs(received.mean()) < 5 * std / 1000
    assert stats.kstest(received.astype(np.float64) / std, "norm").pvalue > ALPHA
    assert abs(stats.kurtosis(received)) < 0.03


def test_noise_of_steps_elements_and_keys_is_independent():
    size = 200_000
    noise = GaussianNoise(KEY, 1.0)
    base = noise.draw(0, 0, size)
    others = {
        "next step": noise.draw(1, 0, size),
        "next elements": noise.draw(0, size, 2 * size),
        "neighbouring element": noise.draw(0, 1, size + 1),
        "other key": GaussianNoise(bytes(32), 1.0).draw(0, 0, size),
    }
    for name, other in others.items():
        assert abs(np.corrcoef(base, other)[0, 1]) < 5 / np.sqrt(size), name


def test_the_same_key_gives_the_same_noise_after_a_restart():
    assert np.array_equal(GaussianNoise(KEY, 1.0).draw(5, 10, 20), GaussianNoise(KEY, 1.0).draw(5, 10, 20))


def test_the_noised_value_lies_on_a_grid_that_does_not_depend_on_the_data():
    noise = GaussianNoise(KEY, 0.3)
    gradient = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    steps = noise.add(gradient, 0, 0).astype(np.float64) / noise.grid
    assert np.array_equal(steps, np.round(steps))
    assert 0.3 * 2.0 ** -(GRID_BITS + 1) < noise.grid <= 0.3 * 2.0**-GRID_BITS


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf")])
def test_noise_of_no_strength_is_refused(std):
    with pytest.raises(ValueError, match="standard deviation"):
        GaussianNoise(KEY, std)


def test_keys_belong_to_one_grant_one_snapshot_and_one_purpose():
    tenant, a, b = bytes(32), "aa" * 32, "bb" * 32
    keys = {
        derive_key(tenant, grant, snapshot, purpose)
        for grant in (a, b)
        for snapshot in (a, b)
        for purpose in ("sampling", "noise")
    }
    assert len(keys | {derive_key(bytes([1]) * 32, a, a, "noise")}) == 9
    assert derive_key(tenant, a, b, "noise") == derive_key(tenant, a, b, "noise")


def test_a_short_tenant_key_is_refused():
    with pytest.raises(ValueError, match="make one of 32"):
        derive_key(b"secret", "aa", "bb", "noise")

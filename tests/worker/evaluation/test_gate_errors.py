"""How strict each look is, against published tables and simulation; how often the whole gate errs."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from tributary_worker.gating.spending import FRACTIONS, levels, looks, spent
from tributary_worker.noninferiority import share_difference, tango_statistic

CANDIDATES = 1000
BENCHMARK = Path(__file__).parents[3] / "benchmarks" / "gate_simulation.py"


def simulation():
    spec = importlib.util.spec_from_file_location("gate_simulation", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_published_boundary():
    """Jennison and Turnbull, and every package since: one-sided 2.5 %, four looks, O'Brien-Fleming type."""
    assert norm.isf(levels(FRACTIONS, 0.025)) == pytest.approx([4.333, 2.963, 2.359, 2.014], abs=1e-3)


def test_one_look_spends_everything():
    assert levels((1.0,), 0.05) == pytest.approx((0.05,), abs=1e-9)


@given(st.lists(st.floats(0.05, 0.95), max_size=4, unique=True), st.floats(0.001, 0.3))
@settings(max_examples=25, deadline=None)
def test_no_look_spends_more_than_is_left(parts, alpha):
    parts = tuple(sorted({round(part, 2) for part in parts} | {1.0}))
    found = levels(parts, alpha)
    assert found[0] == pytest.approx(spent(parts[0], alpha), abs=1e-9)
    assert all(0 < level <= alpha + 1e-9 for level in found)


def test_crossing_anywhere_is_as_likely_as_promised():
    """Brownian motion seen at uneven times crosses the boundary with the chance alpha, look by look."""
    alpha, parts = 0.05, (0.2, 0.55, 0.6, 1.0)
    steps = np.sqrt(np.diff([0.0, *parts]))
    walks = np.cumsum(np.random.default_rng(1).normal(0, 1, (200_000, 4)) * steps, axis=1)
    crossed = walks / np.sqrt(parts) > norm.isf(levels(parts, alpha))
    shares = np.maximum.accumulate(crossed, axis=1).mean(axis=0)
    # Five standard deviations of a share of 5 % in 200 000 walks.
    assert shares == pytest.approx([spent(part, alpha) for part in parts], abs=5 * math.sqrt(0.05 / 200_000))


def test_looks_cover_the_documents_and_none_is_too_small():
    assert [look.documents for look in looks(1000, 20, 0.05)] == [250, 500, 750, 1000]
    assert [look.documents for look in looks(50, 20, 0.05)] == [25, 38, 50]
    assert [look.documents for look in looks(20, 20, 0.05)] == [20]
    with pytest.raises(ValueError, match="fewer than 20"):
        looks(19, 20, 0.05)


def likelihood_statistic(worse, better, count, difference):
    """The oracle: the variance under the hypothesis, its likelihood maximised numerically."""

    def loss(share):
        chances = (share + difference, share, 1 - 2 * share - difference)
        seen = (worse, better, count - worse - better)
        return -sum(n * math.log(max(chance, 1e-300)) for n, chance in zip(seen, chances, strict=True) if n)

    bounds = (max(0.0, -difference), (1 - difference) / 2)
    share = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    variance = count * (2 * share + difference - difference**2)
    return (worse - better - count * difference) / math.sqrt(variance)


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 200), st.floats(-0.5, 0.5))
@settings(max_examples=100, deadline=None)
def test_tangos_statistic_is_that_of_the_most_likely_share(worse, better, same, difference):
    count = worse + better + same
    expected = likelihood_statistic(worse, better, count, difference)
    assert tango_statistic(worse, better, count, difference) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_bounds_are_where_the_statistic_is_the_quantile():
    found = share_difference([1.0] * 9 + [-1.0] * 3 + [0.0] * 32, 0.975)
    z = norm.ppf(0.975)
    assert likelihood_statistic(9, 3, 44, found.upper) == pytest.approx(-z, abs=1e-3)
    assert likelihood_statistic(9, 3, 44, found.lower) == pytest.approx(z, abs=1e-3)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(0, 60), st.floats(0.6, 0.999))
@settings(max_examples=100, deadline=None)
def test_bounds_of_shares_enclose_the_mean_and_mirror(worse, better, same, confidence):
    found = share_difference([1.0] * worse + [-1.0] * better + [0.0] * (same + 1), confidence)
    mirror = share_difference([-1.0] * worse + [1.0] * better + [0.0] * (same + 1), confidence)
    assert -1 <= found.lower < found.mean < found.upper <= 1
    assert (mirror.lower, mirror.upper) == pytest.approx((-found.upper, -found.lower), abs=1e-9)


@pytest.mark.parametrize("kind", ["normal losses", "skewed losses", "answers"])
def test_the_gate_errs_as_seldom_as_promised(kind):
    module = simulation()
    figures = module.simulate(module.KINDS[kind], CANDIDATES, seed=1)
    # 67 of 1000: what a true 5 % exceeds in one run of a hundred.
    assert figures["false_accept"] * CANDIDATES <= 67
    assert figures["false_reject"] <= 0.10
    assert figures["point_ratio_false_accept"] > 0.4
    assert figures["documents_seen_at_zero"] < figures["documents"]

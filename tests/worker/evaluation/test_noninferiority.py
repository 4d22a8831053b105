"""The test's arithmetic against SciPy's own t-test, and its error rates against what it promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tributary_worker.noninferiority import MeanDifference, mean_difference, without_skewness

values = st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=2, max_size=50)
confidences = st.floats(0.51, 0.999)


@given(values, confidences)
@settings(max_examples=300, deadline=None)
def test_without_skewness_bounds_are_those_of_scipy(half, confidence):
    differences = [*half, *(-value for value in half)]
    found = mean_difference(differences, confidence)
    spread = np.std(differences, ddof=1)
    error = spread / np.sqrt(len(differences))
    expected = stats.t.interval(2 * confidence - 1, len(differences) - 1, 0, error) if error else (0, 0)
    assert (found.lower, found.upper) == pytest.approx(expected, abs=1e-6)


@given(st.floats(-6, 6), st.floats(-0.5, 0.5))
@settings(max_examples=300, deadline=None)
def test_halls_transform_of_what_we_invert_is_where_we_began(quantile, g):
    t = without_skewness(quantile, g)
    assert t + g * t**2 / 3 + g**2 * t**3 / 27 + g / 6 == pytest.approx(quantile, abs=1e-6)


@given(values, confidences, st.floats(1e-6, 10))
def test_findings_say_on_which_side_of_the_margin_the_bounds_lie(differences, confidence, margin):
    found = mean_difference(differences, confidence)
    finding = found.finding(margin)
    assert (finding == "PASS") == (found.upper < margin)
    assert (finding == "FAIL") == (found.lower > margin and found.upper >= margin)


@given(values, confidences, st.floats(1e-6, 5), st.floats(0, 5))
def test_a_larger_margin_never_makes_a_pass_fail(differences, confidence, margin, more):
    found = mean_difference(differences, confidence)
    if found.finding(margin) == "PASS":
        assert found.finding(margin + more) == "PASS"


def share_of(finding, true_difference):
    """How often 40 documents at a margin of 0.1 give this finding, with 95 % confidence, in 4000 trials."""
    draws = np.random.default_rng(1).normal(true_difference, 0.3, (4000, 40))
    return np.mean([mean_difference(list(row), 0.95).finding(0.1) == finding for row in draws])


def test_a_candidate_at_the_margin_passes_and_fails_at_most_as_often_as_promised():
    # Five standard deviations of a share of 5 % in 4000 trials.
    assert share_of("PASS", 0.1) < 0.05 + 5 * np.sqrt(0.05 * 0.95 / 4000)
    assert share_of("FAIL", 0.1) < 0.05 + 5 * np.sqrt(0.05 * 0.95 / 4000)


def test_clear_cases_are_told():
    assert share_of("PASS", -0.1) > 0.95
    assert share_of("FAIL", 0.4) > 0.95


def test_equal_differences_have_no_spread():
    assert mean_difference([0.0] * 5, 0.95) == MeanDifference(0.0, 0.0, 0.0, 5)


@pytest.mark.parametrize("differences", [[], [1.0]])
def test_one_document_says_nothing(differences):
    with pytest.raises(ValueError, match="no spread"):
        mean_difference(differences, 0.95)

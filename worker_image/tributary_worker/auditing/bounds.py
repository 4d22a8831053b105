"""From an adversary's guesses to a lower bound of epsilon. Pure statistics: no engine, no randomness.

A bound holds with the confidence that it is asked for, whatever the mechanism is; a right mechanism stays
below its claim, a broken one need not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

EPSILON_MAX = 64.0
"""Beyond any claim; the search for a bound ends here."""
EPSILON_PRECISION = 1e-3

Scores = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Errors:
    """How often a test was wrong, of how many trials."""

    count: int
    trials: int

    def rate_max(self, risk: float) -> float:
        """The largest rate that is not ruled out at this risk (Clopper and Pearson 1934)."""
        if self.count >= self.trials:
            return 1.0
        return float(stats.beta.ppf(1.0 - risk, self.count + 1, self.trials - self.count))


def bound_of_error_rates(false_alarms: Errors, misses: Errors, delta: float, confidence: float) -> float:
    """Lower bound of epsilon from a test's errors (Kairouz, Oh and Viswanath 2015, theorem 2.1).

    Every test of an (epsilon, delta)-DP mechanism has FPR + e^epsilon FNR >= 1 - delta, and the same with
    both exchanged. Each rate gets half of the risk.
    """
    risk = (1.0 - confidence) / 2.0
    fpr, fnr = false_alarms.rate_max(risk), misses.rate_max(risk)
    return max(0.0, _log_ratio(1.0 - delta - fnr, fpr), _log_ratio(1.0 - delta - fpr, fnr))


def bound_of_runs(absent: Scores, present: Scores, delta: float, confidence: float) -> float:
    """Lower bound of epsilon from the scores of independent runs without and with the canary.

    The first half of the runs chooses the threshold, the second half is judged by it: choosing and judging on
    the same runs would overstate the bound.
    """
    (absent_tune, absent_judge), (present_tune, present_judge) = (
        np.array_split(absent, 2),
        np.array_split(present, 2),
    )
    thresholds = np.unique(np.concatenate([absent_tune, present_tune]))

    def bound(threshold: float, without: Scores, including: Scores) -> float:
        false_alarms = Errors(int((without > threshold).sum()), len(without))
        misses = Errors(int((including <= threshold).sum()), len(including))
        return bound_of_error_rates(false_alarms, misses, delta, confidence)

    best = max(thresholds, key=lambda threshold: bound(threshold, absent_tune, present_tune))
    return bound(float(best), absent_judge, present_judge)


def bound_of_one_run(
    scores: Scores, included: npt.NDArray[np.bool_], delta: float, confidence: float
) -> float:
    """Lower bound of epsilon from one run with many canaries, each included by a fair coin of its own.

    The highest scores are guessed to be included and the lowest not (Steinke, Nasr and Jagielski 2023,
    arXiv:2305.08846, algorithm 1). How many guesses are made is fixed beforehand, to keep the bound valid.
    """
    guesses = _guesses(len(scores))
    order = np.argsort(scores, kind="stable")
    right = int(included[order[-guesses:]].sum() + (~included[order[:guesses]]).sum())
    low, high = 0.0, EPSILON_MAX
    while high - low > EPSILON_PRECISION:
        middle = (low + high) / 2.0
        if _chance(len(scores), 2 * guesses, right, middle, delta) < 1.0 - confidence:
            low = middle
        else:
            high = middle
    return low


def _guesses(canaries: int) -> int:
    """For each side: the tenth that is surest, which is near the best for epsilon between 2 and 8."""
    return max(1, canaries // 10)


def _chance(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The largest chance that an (epsilon, delta)-DP mechanism allows for so many right guesses.

    Theorem 5.2 of the same paper: P[W >= v] + 2 m delta max_i P[v > W >= v - i] / i with W ~ Binomial(r,
    e^epsilon / (1 + e^epsilon)), for m canaries and v right ones of r guesses.
    """
    correct = stats.binom(guesses, 1.0 / (1.0 + math.exp(-epsilon)))
    depth = np.arange(1, right + 1)
    below = correct.cdf(right - 1) - correct.cdf(right - 1 - depth)
    excess = float((below / depth).max()) if right else 0.0
    return float(correct.sf(right - 1)) + 2.0 * canaries * delta * excess


def _log_ratio(numerator: float, denominator: float) -> float:
    return math.log(numerator / denominator) if numerator > 0.0 else 0.0

"""Is a candidate no worse than another model? A paired, one-sided test of non-inferiority on the same
documents.

For each document the candidate's figure less the other's is one observation, counted so that more is worse.
With the one-sided confidence bounds of the mean the candidate is no worse if the upper one lies below the
margin (ICH E9 1998, section 3.3.2), worse if the lower one lies above it, and otherwise nobody can tell
yet. Requiring this against several models at once needs no correction, as all must hold (intersection-union
test, Berger 1982, "Multiparameter hypothesis testing and acceptance sampling").

Losses get Student's t after Hall's transformation (1992, "On the removal of skewness by transformation",
JRSS B 54): a few documents that get much worse would else make the plain t test accept too often. Right and
wrong answers get Tango's score bounds (1998, "Equivalence test and confidence interval for the difference
in proportions for the paired-sample design", Statistics in Medicine 17): where two models hardly ever
disagree a t test sees no spread and is sure of anything, and McNemar's test knows no margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats
from scipy.optimize import brentq

from tributary_worker.gating.spending import Look

SPREAD_MIN = 2
"""With fewer differences there is no spread to judge by."""
SKEWNESS_MIN = 1e-9
"""With less the transform is the identity, and its inverse loses its digits."""
POWER = 0.9
"""Chance to pass at no difference that more documents are suggested for."""

Finding = Literal["PASS", "FAIL", "INCONCLUSIVE"]


@dataclass(frozen=True, slots=True)
class MeanDifference:
    """The mean of paired differences and its one-sided confidence bounds, all in the differences' unit."""

    mean: float
    lower: float
    upper: float
    count: int

    def finding(self, margin: float) -> Finding:
        """PASS: worse by less than `margin`. FAIL: worse by more. INCONCLUSIVE: neither is certain enough."""
        if self.upper < margin:
            return "PASS"
        return "FAIL" if self.lower > margin else "INCONCLUSIVE"


Bounds = Callable[[Sequence[float], float], MeanDifference]
"""(differences, confidence of each bound) -> their mean and its bounds."""


def sequential(
    differences: Sequence[float], looks: Sequence[Look], margin: float, bounds: Bounds
) -> MeanDifference:
    """The mean difference at the first look that is sure of something, or at the last one there are data for.

    ValueError if there are fewer differences than the first look needs.
    """
    possible = [look for look in looks if look.documents <= len(differences)]
    if not possible:
        raise ValueError(f"{len(differences)} differences are too few for the first look")
    for look in possible:
        found = bounds(differences[: look.documents], 1 - look.level)
        if found.finding(margin) != "INCONCLUSIVE":
            break
    return found


def mean_difference(differences: Sequence[float], confidence: float) -> MeanDifference:
    """Bounds that each hold with `confidence`, above 0.5. ValueError below SPREAD_MIN differences."""
    count = len(differences)
    if count < SPREAD_MIN:
        raise ValueError(f"{count} differences have no spread")
    mean = math.fsum(differences) / count
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (count - 1)
    if variance == 0:
        return MeanDifference(mean, mean, mean, count)
    error, quantile = math.sqrt(variance / count), float(stats.t.ppf(confidence, count - 1))
    third = math.fsum(((difference - mean) / error) ** 3 for difference in differences) / count**3
    lower, upper = (mean - error * without_skewness(y, third) for y in (quantile, -quantile))
    return MeanDifference(mean, lower, upper, count)


def without_skewness(quantile: float, skewness: float) -> float:
    """The value T of the t statistic whose transform is `quantile`; `skewness` is that of the sample's mean.

    Hall's transform T + g T^2 / 3 + g^2 T^3 / 27 + g / 6, with g the skewness, is nearly symmetric and rises
    everywhere; its inverse follows from (1 + g T / 3)^3 = 1 + g (quantile - g / 6).
    """
    if abs(skewness) < SKEWNESS_MIN:
        return quantile
    return 3 / skewness * (math.cbrt(1 + skewness * (quantile - skewness / 6)) - 1)


def share_difference(differences: Sequence[float], confidence: float) -> MeanDifference:
    """Tango's bounds for differences of -1, 0 and 1, which each hold with `confidence`, above 0.5."""
    count = len(differences)
    worse = sum(1 for difference in differences if difference > 0)
    better = sum(1 for difference in differences if difference < 0)
    upper = _share_bound(worse, better, count, confidence)
    lower = -_share_bound(better, worse, count, confidence)
    return MeanDifference((worse - better) / count, lower, upper, count)


def _share_bound(worse: int, better: int, count: int, confidence: float) -> float:
    """The least difference of shares that the counts rule out from above: Tango's statistic is -z there."""
    z = float(stats.norm.ppf(confidence))
    mean = (worse - better) / count
    if worse == count:
        return 1.0
    return float(brentq(lambda d: tango_statistic(worse, better, count, d) + z, mean, 1 - 1e-12))


def tango_statistic(worse: int, better: int, count: int, difference: float) -> float:
    """Tango's standardised distance of the observed difference of shares from `difference`, below 1.

    `worse` and `better` count the documents on which the candidate alone is wrong, and alone is right. The
    variance is that under the hypothesis, with the most likely share of `better` given it.
    """
    distance = worse - better - count * difference
    a, c = 2 * count, -better * difference * (1 - difference)
    b = -worse - better + (2 * count - worse + better) * difference
    share = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = count * (2 * share + difference * (1 - difference))
    return distance / math.sqrt(variance) if variance > 0 else 0.0


def documents_wanted(found: MeanDifference, margin: float, confidence: float) -> int | None:
    """How many documents may decide, by the spread seen so far; None if the mean is beyond the margin.

    The usual n = ((z_confidence + z_power) / (distance to the margin in standard deviations))^2.
    """
    distance = margin - found.mean
    if distance <= 0:
        return None
    reach = float(stats.norm.ppf(confidence)) + float(stats.norm.ppf(POWER))
    return math.ceil(found.count * (reach * _standard_error(found, confidence) / distance) ** 2)


def _standard_error(found: MeanDifference, confidence: float) -> float:
    return (found.upper - found.lower) / (2 * float(stats.norm.ppf(confidence)))

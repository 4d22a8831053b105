"""Is a candidate no worse than another model? A paired, one-sided test of non-inferiority on mean losses.

For each document the difference of the losses, candidate less other, is one observation. With the one-sided
confidence bounds of their mean (Student's t) the candidate is no worse if the upper one lies below the margin
(ICH E9 1998, section 3.3.2), worse if the lower one lies above it, and otherwise there are too few documents
to tell. Requiring this against several models at once needs no correction for multiplicity, as all must hold
(intersection-union test, Berger 1982, "Multiparameter hypothesis testing and acceptance sampling").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

DOCUMENTS_MIN = 2
"""With fewer differences there is no spread to judge by."""

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


def mean_difference(differences: Sequence[float], confidence: float) -> MeanDifference:
    """Bounds that each hold with `confidence`, above 0.5. ValueError below DOCUMENTS_MIN differences."""
    count = len(differences)
    if count < DOCUMENTS_MIN:
        raise ValueError(f"{count} differences have no spread")
    mean = math.fsum(differences) / count
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (count - 1)
    reach = float(stats.t.ppf(confidence, count - 1)) * math.sqrt(variance / count)
    return MeanDifference(mean, mean - reach, mean + reach, count)

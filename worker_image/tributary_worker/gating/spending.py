"""When the gate may look, and how strict each look is, so that looking often does not make it err more often.

A test that is repeated on growing samples at the same level errs far more often than that level. Lan and
DeMets (1983, "Discrete sequential boundaries for clinical trials", Biometrika 70) spend the level alpha
over the part t of the documents that has been seen; here by their function of the O'Brien-Fleming type,

    alpha(t) = 2 - 2 Phi(z / sqrt(t)),   z = Phi^-1(1 - alpha / 2),

which spends almost nothing early and leaves the last look nearly what a single look would be. The critical
value of look k makes the chance of crossing there first, and not before, equal to alpha(t_k) -
alpha(t_k-1). These chances follow from the density of the standardised sum, carried from look to look by
integration on a grid (Armitage, McPherson and Rowe 1969; Jennison and Turnbull 2000, "Group sequential
methods", chapter 19).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import norm

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
"""Of the documents, at which the gate looks."""
GRID_POINTS = 801
"""Of the density between looks; with twice as many no level changes in its fifth digit."""
REACH = 8.0
"""Standard deviations beyond which the density is nothing."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Look:
    """One analysis of the first `documents` documents, one-sided at `level`."""

    documents: int
    level: float


def looks(total: int, documents_min: int, alpha: float) -> tuple[Look, ...]:
    """The looks at `total` documents, the last at all of them; none at fewer than `documents_min`.

    `alpha`, in (0, 0.5), bounds the chance that any look errs. ValueError if there are too few documents.
    """
    if total < documents_min:
        raise ValueError(f"{total} documents are fewer than {documents_min}")
    counts = sorted({math.ceil(part * total) for part in FRACTIONS})
    counts = [count for count in counts if count >= documents_min]
    parts = tuple(count / total for count in counts)
    return tuple(Look(*pair) for pair in zip(counts, levels(parts, alpha), strict=True))


def spent(part: float, alpha: float) -> float:
    """What may have been spent of `alpha` when `part` of the documents, in (0, 1], has been seen."""
    return float(2 * norm.sf(norm.isf(alpha / 2) / math.sqrt(part)))


@cache
def levels(parts: tuple[float, ...], alpha: float) -> tuple[float, ...]:
    """The one-sided level of the look at each of the rising `parts` of the documents."""
    found: list[float] = []
    grid, density = np.zeros(1), np.ones(1)  # before the first look the sum is 0 for sure
    seen, before = 0.0, 0.0
    for part in parts:
        share, step = spent(part, alpha) - before, math.sqrt(part - seen)
        critical = _critical(grid, density, share, step)
        found.append(float(norm.sf(critical / math.sqrt(part))))
        grid, density = _carried(grid, density, critical, step, part)
        seen, before = part, before + share
    return tuple(found)


def _critical(grid: Floats, density: Floats, share: float, step: float) -> float:
    """The value that the sum exceeds at the next look with the chance `share`."""

    def excess(value: float) -> float:
        return float(np.sum(density * norm.sf((value - grid) / step))) - share

    return float(brentq(excess, -REACH, 2 * REACH, xtol=1e-10))


def _carried(
    grid: Floats, density: Floats, critical: float, step: float, part: float
) -> tuple[Floats, Floats]:
    """The sum's density below the critical value of this look, as weights on a new grid."""
    new = np.linspace(-REACH * math.sqrt(part), critical, GRID_POINTS)
    weights = np.full(GRID_POINTS, new[1] - new[0])
    weights[[0, -1]] /= 2  # the trapezoidal rule
    return new, weights * (norm.pdf((new[:, None] - grid) / step) @ density) / step

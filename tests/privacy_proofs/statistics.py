"""Tests of randomness with fixed seeds: what they find once they find always."""

from __future__ import annotations

import numpy as np

ALPHA = 1e-6
"""Chance that a right implementation fails a test, before its seed is fixed."""
DEVIATIONS = 5.0
"""The same chance, in standard deviations of a normal distribution (two-sided)."""


def is_uncorrelated(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two samples of equal shape correlate no more than independent ones do by chance."""
    return bool(abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < DEVIATIONS / np.sqrt(a.size))

"""The element types of model weights as NumPy sees them; bfloat16, which it lacks, by its bits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tributary_store.objects import Bytes

Array = npt.NDArray[Any]

FLOAT_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "F64": np.dtype("<f8"),
}
WEIGHT_DTYPES = frozenset({*FLOAT_DTYPES, "BF16"})
"""Types of weights that a delta can be added to."""


class NonFiniteError(ValueError):
    """Values that are infinite or not numbers."""


def sum_of_squares(values: Array) -> float:
    """Σ x² of a flat array. NonFiniteError if any x is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(np.dot(values, values))
    if math.isfinite(total):
        return total
    if not np.isfinite(values).all():
        raise NonFiniteError("a value is not finite")
    wide = values.astype(np.float64)  # the squares leave the range of float32
    return float(np.dot(wide, wide))


def decode(data: Bytes, dtype: str) -> Array:
    """Little-endian bytes as float64, flat."""
    if dtype == "BF16":
        bits = np.frombuffer(data, "<u2").astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32).astype(np.float64)
    return np.frombuffer(data, FLOAT_DTYPES[dtype]).astype(np.float64)


def encode(values: Array, dtype: str) -> bytes:
    """Float64 values as little-endian bytes, rounded to the nearest, ties to even."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(FLOAT_DTYPES[dtype]).tobytes()
    bits = values.astype(np.float32).reshape(-1).view(np.uint32)
    # Adding half of the last kept place, less one unless that place is odd, rounds when the rest is cut off.
    rounding = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return ((bits + rounding) >> np.uint32(16)).astype("<u2").tobytes()

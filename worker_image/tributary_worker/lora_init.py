"""The frozen factor A of every adapter, from the round's key: clients and aggregator compute the same.

NumPy only. It takes raw Philox words, whose stream NumPy keeps for ever; that of its distributions may
change (NumPy Enhancement Proposal 19).
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import numpy.typing as npt

FRACTION_BITS = 53
"""Of a float64: a raw 64-bit word gives its top bits."""


def frozen_a(run_key: str, module: str, rank: int, in_features: int) -> npt.NDArray[np.float32]:
    """A (rank, in_features), uniform on ±1/sqrt(in_features), as in the LoRA paper's code."""
    seed = hashlib.sha256(f"{run_key}/{module}".encode()).digest()
    generator: Any = np.random.Philox(key=int.from_bytes(seed[:16], "big"))
    words = generator.random_raw(rank * in_features)
    fractions = (words >> np.uint64(64 - FRACTION_BITS)) * 2.0**-FRACTION_BITS
    bound = 1.0 / math.sqrt(in_features)
    return ((2.0 * fractions - 1.0) * bound).astype(np.float32).reshape(rank, in_features)

"""Gaussian noise that is a pure function of (key, step, element), whoever computes it and in whatever order.

So the noise of a step does not depend on world size, ZeRO stage or restarts: a retry publishes the same
delta.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tributary_worker.privacy.keystream import Keystream

WORDS_PER_ELEMENT = 4
ELEMENTS_PER_CHUNK = 2**15
"""Stays in the cache, and PyTorch does not divide an operation of this size: whole chunks go to threads."""

GRID_BITS = 18
"""The noised value is rounded to a multiple of a power of two at most std * 2**-18: coarse beside the 53 bits
of the sampler, fine beside the noise (it changes the variance by one part in 1e11), and exact in float32 up
to 32 std."""


class GaussianNoise:
    """N(0, std**2) for each element of the flat vector of trained weights.

    Floating-point numbers leave holes that can reveal what the noise was added to (Mironov, CCS 2012; Jin et
    al., IEEE S&P 2022, for Gaussians). Two measures: each value is the sum of four independent Box-Muller
    Gaussians, halved (Holohan and Braghin, ESORICS 2021, arXiv:2107.10138: searching the preimages then costs
    more than 2**150), and `add` rounds onto a grid that does not depend on the data.
    """

    def __init__(self, key: bytes, std: float) -> None:
        if not (math.isfinite(std) and std > 0):
            raise ValueError(f"the noise's standard deviation must be positive and finite, not {std}")
        self.std = std
        self.grid = 2.0 ** (math.floor(math.log2(std)) - GRID_BITS)
        self._keystream = Keystream(key)

    def draw(self, step: int, start: int, stop: int) -> npt.NDArray[np.float64]:
        """The noise of elements [start, stop) in a step, float64, shape (stop - start,)."""
        chunks = [self._standard(step, a, b) for a, b in _chunks(start, stop)]
        return self.std * np.concatenate(chunks) if chunks else np.zeros(0)

    def add(self, gradient: npt.NDArray[np.float32], step: int, start: int) -> npt.NDArray[np.float32]:
        """The gradient (elements start, start + 1, ...) plus its noise, summed in float64 and put on the
        grid."""
        noised = np.empty_like(gradient)

        def add_chunk(chunk: tuple[int, int]) -> None:
            place = slice(chunk[0] - start, chunk[1] - start)
            exact = gradient[place].astype(np.float64) + self.std * self._standard(step, *chunk)
            noised[place] = np.round(exact / self.grid) * self.grid

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(add_chunk, _chunks(start, start + len(gradient))))
        return noised

    def _standard(self, step: int, start: int, stop: int) -> npt.NDArray[np.float64]:
        words = self._keystream.words(step, WORDS_PER_ELEMENT * start, WORDS_PER_ELEMENT * (stop - start))
        # 53 bits, and never 0, whose logarithm would be infinite. One row for each of the four words.
        bits = (words >> np.uint64(11)).view(np.int64).astype(np.float64).reshape(-1, WORDS_PER_ELEMENT).T
        uniforms = torch.from_numpy((np.ascontiguousarray(bits) + 1.0) * 2.0**-53)
        radius_a, angle_a, radius_b, angle_b = uniforms
        total = _box_muller_pair(radius_a, angle_a).add_(_box_muller_pair(radius_b, angle_b))
        standard: npt.NDArray[np.float64] = total.mul_(0.5).numpy()
        return standard


def _box_muller_pair(radius: Tensor, angle: Tensor) -> Tensor:
    """The sum of both Gaussians of a Box-Muller pair (Box and Muller, 1958), from two uniforms in (0, 1],
    which are used up. In PyTorch, whose logarithm, sine and cosine are several times as fast as NumPy's."""
    turn = angle.mul_(2.0 * math.pi)
    return radius.log_().mul_(-2.0).sqrt_().mul_(turn.cos().add_(turn.sin_()))


def _chunks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for a in range(start, stop, ELEMENTS_PER_CHUNK):
        yield a, min(a + ELEMENTS_PER_CHUNK, stop)

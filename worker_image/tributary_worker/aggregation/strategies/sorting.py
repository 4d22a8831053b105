"""The elements of all clients in order, coordinate by coordinate, without a sort for each coordinate.

A sorting network compares whole rows, so that every step is one pass of the processor's vector unit over
contiguous numbers. Of the network only the comparators are kept on which the wanted ranks depend.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from tributary_worker.aggregation.numbers import Array

BLOCK_ELEMENTS = 1 << 14
"""Elements of a row that are worked on at a time: the rows of some ten clients then stay in the cache."""

Comparator = tuple[int, int]


def merge_exchange(rows: int) -> Iterator[Comparator]:
    """A network that sorts any number of rows (Batcher 1968; Knuth, volume 3, algorithm 5.2.2 M)."""
    top = 1 << max(0, (rows - 1).bit_length() - 1)
    p = top if rows > 1 else 0
    while p:
        q, r, d = top, 0, p
        while True:
            yield from ((i, i + d) for i in range(rows - d) if i & p == r)
            if q == p:
                break
            q, r, d = q // 2, p, q - p
        p //= 2


@lru_cache(maxsize=64)
def network(rows: int, ranks: tuple[int, ...]) -> tuple[Comparator, ...]:
    """The comparators that put the rows of these ranks, from the smallest, in their places."""
    needed, kept = set(ranks), []
    for low, high in reversed(list(merge_exchange(rows))):
        if {low, high} & needed:
            needed |= {low, high}
            kept.append((low, high))
    return tuple(reversed(kept))


def ranked(values: Array, ranks: Sequence[int]) -> Iterator[tuple[slice, list[Array]]]:
    """For each block of elements its place, and for each rank the elements (block,) of that rank.

    `values` (clients, elements) stays as it is; what is given is only good until the next block.
    """
    comparators = network(len(values), tuple(ranks))
    for start in range(0, values.shape[1], BLOCK_ELEMENTS):
        block = slice(start, min(start + BLOCK_ELEMENTS, values.shape[1]))
        rows = list(values[:, block].copy())
        spare = np.empty_like(rows[0])
        for low, high in comparators:
            np.minimum(rows[low], rows[high], out=spare)
            np.maximum(rows[low], rows[high], out=rows[high])
            rows[low], spare = spare, rows[low]
        yield block, [rows[rank] for rank in ranks]

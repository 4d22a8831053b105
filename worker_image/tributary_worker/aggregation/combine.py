"""From the values of every client to one: block by block, in the order of the clients' names.

Sums are made element by element in float64 and in a fixed order, never by BLAS: the same deltas give the same
bytes on every processor and with any number of threads. Where a strategy wants all clients' values at once,
they are laid down in a scratch file and picked up window by window: memory does not grow with the clients.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from tributary_worker.aggregation.blocks import Block, elements_of
from tributary_worker.aggregation.numbers import Array
from tributary_worker.aggregation.reader import prefetched
from tributary_worker.aggregation.scratch import unnamed_file
from tributary_worker.aggregation.values import PART_ELEMENTS, Values

WINDOW_ELEMENTS = 1 << 20
"""Elements of all clients together that a strategy sees at a time."""
VALUE_BYTES = 4


@dataclass(frozen=True, slots=True)
class Cohort:
    """The values of some clients over some blocks."""

    values: Values
    clients: Sequence[int]
    """Numbers of the clients that are asked for; the others add nothing."""
    blocks: Sequence[Block]
    ahead: int
    """How many blocks of one client are fetched before they are needed."""

    @property
    def block_elements(self) -> int:
        """Of the largest block."""
        return max(map(elements_of, self.blocks), default=0)

    def parts(self) -> Iterator[Iterator[tuple[int, Array]]]:
        """For each block and each client in order: (place in the block, values) of small parts."""
        tasks = (partial(self.values.block, i, block) for block in self.blocks for i in self.clients)
        return map(_placed, prefetched(tasks, self.ahead))


def _placed(arrays: Iterable[Array]) -> Iterator[tuple[int, Array]]:
    place = 0
    for values in arrays:
        for start in range(0, len(values), PART_ELEMENTS):
            part = values[start : start + PART_ELEMENTS]
            yield place, part
            place += len(part)


def weighted_sums(cohort: Cohort, weights: Array) -> Iterator[tuple[Block, Array]]:
    """Σ wᵢ xᵢ of each block, in float64. The array is used again for the next block."""
    parts, product, sums = cohort.parts(), np.empty(PART_ELEMENTS), np.empty(cohort.block_elements)
    for block in cohort.blocks:
        total = sums[: elements_of(block)]
        total[:] = 0.0
        for client in cohort.clients:
            for place, values in next(parts):
                weighted = product[: len(values)]
                np.multiply(values, weights[client], out=weighted, dtype=np.float64)
                total[place : place + len(values)] += weighted
        yield block, total


def combinations(
    cohort: Cohort, combine: Callable[[Array], Array], directory: Path
) -> Iterator[tuple[Block, Array]]:
    """What `combine` makes of each block's values (clients, elements): float64, in one array used again."""
    combined = np.empty(cohort.block_elements)
    for block, windows in together(cohort, directory):
        total = combined[: elements_of(block)]
        for place, values in windows:
            total[place : place + values.shape[1]] = combine(values)
        yield block, total


@dataclass(slots=True)
class Rows:
    """A matrix (clients, elements) of float32 on disk, of which a window of columns is in memory."""

    clients: int
    elements: int
    directory: Path
    _file: int = field(init=False)

    def __post_init__(self) -> None:
        self._file = unnamed_file(self.directory)

    def write(self, row: int, place: int, values: Array) -> None:
        data = np.ascontiguousarray(values, np.float32)
        os.pwrite(self._file, data.data, (row * self.elements + place) * VALUE_BYTES)

    def windows(self, elements: int) -> Iterator[tuple[int, Array]]:
        """(first column, (clients, columns)) over the first `elements` columns; the array is used again."""
        width = max(1, WINDOW_ELEMENTS // self.clients)
        for start in range(0, elements, width):
            columns = min(width, elements - start)
            window = np.empty((self.clients, columns), np.float32)
            for row in range(self.clients):
                os.preadv(self._file, [window[row].data], (row * self.elements + start) * VALUE_BYTES)
            yield start, window

    def close(self) -> None:
        os.close(self._file)


def together(cohort: Cohort, directory: Path) -> Iterator[tuple[Block, Iterator[tuple[int, Array]]]]:
    """For each block windows of the values of all clients: (place in the block, (clients, elements))."""
    rows = Rows(len(cohort.clients), cohort.block_elements, directory)
    parts = cohort.parts()
    try:
        for block in cohort.blocks:
            for row in range(len(cohort.clients)):
                for place, values in next(parts):
                    rows.write(row, place, values)
            yield block, rows.windows(elements_of(block))
    finally:
        rows.close()


def gram_matrix(cohort: Cohort, directory: Path) -> Array:
    """<dᵢ, dⱼ> of all clients over the blocks, (clients, clients) float64.

    The last bits depend on the BLAS; so what was computed once is recorded, and everybody uses the record.
    """
    products = np.zeros((len(cohort.clients),) * 2)
    for _, windows in together(cohort, directory):
        for _, window in windows:
            values = window.astype(np.float64)
            products += values @ values.T
    return products

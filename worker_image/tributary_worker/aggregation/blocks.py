"""Cutting weights into blocks: what of a model is in memory at a time.

A block ends where a chunk of the deltas ends, so that each chunk is fetched once, checked, used up and
dropped. Results never depend on where blocks end: every sum is made element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

BLOCK_ELEMENTS_MAX = 1 << 24
"""As many as a chunk has of one byte; their sums take 128 MiB. Of four-byte elements a chunk has a fourth."""


@dataclass(frozen=True, slots=True)
class Variable:
    """A tensor whose values the clients' deltas have: its elements are numbered row by row."""

    name: str
    elements: int


@dataclass(frozen=True, slots=True)
class Segment:
    """The elements from `start` to `stop` of a variable."""

    name: str
    start: int
    stop: int

    @property
    def elements(self) -> int:
        return self.stop - self.start


Block = tuple[Segment, ...]
Boundary = Callable[[str, int], int]
"""(variable, element) to the first element after it at which a chunk of the deltas begins."""


def elements_of(block: Block) -> int:
    return sum(segment.elements for segment in block)


def cut(variables: Sequence[Variable], elements_max: int, boundary: Boundary) -> Iterator[Block]:
    """All elements of all variables in order, in blocks of at most `elements_max`."""
    block: list[Segment] = []
    room = elements_max
    for variable in variables:
        start = 0
        while start < variable.elements:
            edge = boundary(variable.name, start)
            stop = min(variable.elements, start + room, edge)
            block.append(Segment(variable.name, start, stop))
            room -= stop - start
            if not room or stop == edge:
                yield tuple(block)
                block, room = [], elements_max
            start = stop
    if block:
        yield tuple(block)

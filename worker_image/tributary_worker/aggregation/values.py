"""Where the clients' values come from: streamed from the store, or from local copies of small deltas."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from tributary_api.aggregation import DeltaEncoding
from tributary_api.base import sha256_of
from tributary_api.records import CHUNK_BYTES
from tributary_store.digests import spans
from tributary_store.errors import ObjectDamaged, ObjectMissing
from tributary_store.objects import Bytes, Objects
from tributary_store.tensors import DTYPE_BYTES
from tributary_worker.aggregation.blocks import Block, Segment
from tributary_worker.aggregation.deltas import Delta, DeltaRejectedError, ExpectedTensor, Rejection
from tributary_worker.aggregation.encodings import EncodingError, StoredTensor, decode_block
from tributary_worker.aggregation.numbers import Array, NonFiniteError, sum_of_squares
from tributary_worker.aggregation.reader import CheckedReader, Count, prefetched
from tributary_worker.aggregation.scratch import unnamed_file

PART_ELEMENTS = 1 << 16
"""Elements that are worked on at a time: a few such arrays stay in a processor's cache."""

Span = tuple[int, int]


class Values(Protocol):
    """The values of the clients' variables. Used from several threads."""

    def block(self, client: int, block: Block) -> Iterable[Array]:
        """The values of one client's delta in small flat parts, in order; decoded when they are asked for.

        DeltaRejectedError, by this call or by a part, if the delta is not what was published, or cannot be
        used.
        """
        ...


def chunk_boundary(delta: Delta) -> Callable[[str, int], int]:
    """Where a chunk of this delta begins next: see `blocks.Boundary`."""

    def boundary(name: str, element: int) -> int:
        stored = delta.tensors[name]
        byte, start = stored.span(element, element + 1)[0], stored.values.start
        until_edge = byte - byte % CHUNK_BYTES + CHUNK_BYTES - start
        if stored.encoding is DeltaEncoding.INT4:
            return 2 * until_edge
        return -(-until_edge // DTYPE_BYTES[stored.values.dtype])

    return boundary


@contextmanager
def rejecting(delta: Delta) -> Iterator[None]:
    """Within, an object that is absent or damaged, or cannot be decoded, is this client's fault."""
    try:
        yield
    except ObjectMissing as error:
        raise DeltaRejectedError(delta.client, Rejection.MISSING, str(error)) from error
    except ObjectDamaged as error:
        raise DeltaRejectedError(delta.client, Rejection.DAMAGED, str(error)) from error
    except (NonFiniteError, EncodingError) as error:
        raise DeltaRejectedError(delta.client, Rejection.NON_FINITE, str(error)) from error


def decoded(stored: StoredTensor, segment: Segment, values: Bytes, scales: Bytes) -> Iterator[Array]:
    """A segment part by part, float32, from the bytes of its spans."""
    origin = stored.span(segment.start, segment.stop)[0]
    scales_origin = stored.scales_span(segment.start, segment.stop)[0]
    for start in range(segment.start, segment.stop, PART_ELEMENTS):
        stop = min(start + PART_ELEMENTS, segment.stop)
        first, last = stored.span(start, stop)
        first_scale, last_scale = stored.scales_span(start, stop)
        here = values[first - origin : last - origin]
        scales_here = scales[first_scale - scales_origin : last_scale - scales_origin]
        try:
            yield decode_block(stored, here, scales_here, start, stop)
        except EncodingError as error:
            raise EncodingError(f"tensor {segment.name}: {error}") from error


def finite_squares(name: str, values: Array) -> float:
    """Sum of the squares of some elements of a tensor; NonFiniteError names the tensor."""
    try:
        return sum_of_squares(values)
    except NonFiniteError as error:
        raise NonFiniteError(f"tensor {name} is not finite") from error


@dataclass(slots=True)
class Scales:
    """The scales of encoded deltas on local disk: in their files they lie apart from the elements.

    About a thirtieth of the delta; only those of the tensors that are asked for.
    """

    file: int
    places: dict[tuple[int, str], int] = field(default_factory=dict[tuple[int, str], int])
    end: int = 0

    def fetch(self, client: int, tensors: Sequence[StoredTensor], reader: CheckedReader) -> None:
        infos = sorted((t.scales for t in tensors if t.scales is not None), key=lambda info: info.start)
        for run in _runs([(info.start, info.start + info.length) for info in infos]):
            first, last = run[0][0], run[-1][1]
            for start, length in spans(last - first):
                os.pwrite(self.file, reader.read(first + start, length), self.end + start)
            for info in infos:
                if first <= info.start < last:
                    self.places[client, info.name] = self.end - first
            self.end += last - first

    def read(self, client: int, stored: StoredTensor, segment: Segment) -> Bytes:
        if stored.scales is None:
            return b""
        first, last = stored.scales_span(segment.start, segment.stop)
        return os.pread(self.file, last - first, first + self.places[client, stored.scales.name])


@dataclass(frozen=True, slots=True)
class Streamed:
    """Values straight from the store: for deltas as large as the model."""

    deltas: Sequence[Delta]
    readers: Sequence[CheckedReader]
    scales: Scales
    squares: list[float]
    """Of each client: sum of the squares of what went by."""

    @classmethod
    def of(
        cls, store: Objects, deltas: Sequence[Delta], names: Sequence[str], directory: Path, count: Count
    ) -> Streamed:
        """Those of the variables `names`."""
        readers = [CheckedReader(store, delta.uri, delta.manifest.file, count) for delta in deltas]
        streamed = cls(deltas, readers, Scales(unnamed_file(directory)), [0.0] * len(deltas))
        for client, delta in enumerate(deltas):
            with rejecting(delta):
                streamed.scales.fetch(client, [delta.tensors[name] for name in names], readers[client])
        return streamed

    def block(self, client: int, block: Block) -> Iterable[Array]:
        delta = self.deltas[client]
        with rejecting(delta):
            data = list(self._bytes(client, block))
        return self._decoded(client, block, data)

    def _decoded(self, client: int, block: Block, data: list[Bytes]) -> Iterator[Array]:
        delta = self.deltas[client]
        with rejecting(delta):
            for segment, values in zip(block, data, strict=True):
                stored = delta.tensors[segment.name]
                scales = self.scales.read(client, stored, segment)
                for part in decoded(stored, segment, values, scales):
                    self.squares[client] += finite_squares(segment.name, part)
                    yield part

    def _bytes(self, client: int, block: Block) -> Iterator[Bytes]:
        """The bytes of each segment; what lies together is fetched together."""
        delta, reader = self.deltas[client], self.readers[client]
        places = [delta.tensors[segment.name].span(segment.start, segment.stop) for segment in block]
        for run in _runs(places):
            # In the first chunk the header lies, too, which nobody has checked before.
            first = run[0][0] if run[0][0] >= CHUNK_BYTES else 0
            data = memoryview(reader.read(first, run[-1][1] - first))
            if not first and data[: len(delta.header_bytes)] != delta.header_bytes:
                raise ObjectDamaged(f"{delta.uri}: its header changed while it was read")
            yield from (data[start - first : stop - first] for start, stop in run)

    def close(self) -> None:
        os.close(self.scales.file)


def _runs(places: Sequence[Span]) -> Iterator[list[Span]]:
    """Places that follow one another, together."""
    run: list[Span] = []
    for place in places:
        if run and run[-1][1] != place[0]:
            yield run
            run = []
        run.append(place)
    if run:
        yield run


@dataclass(frozen=True, slots=True)
class Copies:
    """Checked copies of whole deltas on local disk: for small ones, of which every pod needs all."""

    deltas: Sequence[Delta]
    files: Sequence[int]

    @classmethod
    def of(cls, store: Objects, deltas: Sequence[Delta], directory: Path, count: Count, ahead: int) -> Copies:
        """Fetch them. DeltaRejectedError names the first one that is not what was published."""
        copies = cls(deltas, [unnamed_file(directory) for _ in deltas])
        tasks = (
            partial(copies.fetch, client, CheckedReader(store, delta.uri, delta.manifest.file, count), at)
            for client, delta in enumerate(deltas)
            for at, _ in spans(delta.manifest.file.size)
        )
        for _ in prefetched(tasks, ahead):
            pass
        return copies

    def fetch(self, client: int, reader: CheckedReader, start: int) -> None:
        with rejecting(self.deltas[client]):
            os.pwrite(self.files[client], reader.chunk(start), start)

    def check(self, client: int, expected: Mapping[str, ExpectedTensor]) -> float:
        """Check every value of a delta; gives the sum of the squares of its trained tensors.

        DeltaRejectedError if a value is not finite, or not the one that is known beforehand.
        """
        delta, squares = self.deltas[client], 0.0
        with rejecting(delta):
            if os.pread(self.files[client], len(delta.header_bytes), 0) != delta.header_bytes:
                raise ObjectDamaged(f"{delta.uri}: its header changed while it was read")
            for name, stored in delta.tensors.items():
                values = self.read(client, name, 0, stored.elements)
                of_tensor = finite_squares(name, values)
                known = expected[name].digest
                if known is None:
                    squares += of_tensor
                elif sha256_of(values.tobytes()) != known:
                    message = f"tensor {name} is not the frozen one that this run's key gives"
                    raise DeltaRejectedError(delta.client, Rejection.FOREIGN, message)
        return squares

    def read(self, client: int, name: str, start: int, stop: int) -> Array:
        """Elements of a tensor, float32, flat."""
        stored, file = self.deltas[client].tensors[name], self.files[client]
        first, last = stored.span(start, stop)
        first_scale, last_scale = stored.scales_span(start, stop)
        scales = os.pread(file, last_scale - first_scale, first_scale)
        return decode_block(stored, os.pread(file, last - first, first), scales, start, stop)

    def close(self) -> None:
        for file in self.files:
            os.close(file)

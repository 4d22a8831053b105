"""Parts of an object, each byte checked against the digests that its manifest promises."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from tributary_api.records import CHUNK_BYTES, FileDigest
from tributary_store.digests import check_chunk, check_complete
from tributary_store.objects import Bytes, Objects

T = TypeVar("T")
Count = Callable[[int], None]
"""Is told of bytes that were read from the store; from several threads."""


def uncounted(_count: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class CheckedReader:
    """Reads an object by whole chunks of 16 MiB and keeps none of them."""

    store: Objects
    uri: str
    digest: FileDigest
    count: Count = uncounted

    def __post_init__(self) -> None:
        check_complete(self.uri, self.digest)

    def read(self, start: int, length: int) -> Bytes:
        """`length` bytes from `start`; ObjectDamaged if a chunk with some of them is not as published."""
        end, first = min(start + length, self.digest.size), start - start % CHUNK_BYTES
        if end <= first + CHUNK_BYTES:
            return memoryview(self.chunk(first))[start - first : end - first] if end > start else b""
        data = bytearray(end - start)
        for place in range(first, end, CHUNK_BYTES):
            part = memoryview(self.chunk(place))[max(start - place, 0) : end - place]
            at = max(place - start, 0)
            data[at : at + len(part)] = part
        return data

    def chunk(self, start: int) -> bytes:
        """The chunk that begins at byte `start`."""
        length = min(CHUNK_BYTES, self.digest.size - start)
        data = self.store.get_range(self.uri, start, length)
        self.count(length)
        check_chunk(self.uri, self.digest, start, data)
        return data


def prefetched(tasks: Iterable[Callable[[], T]], ahead: int) -> Iterator[T]:
    """The results of the tasks in their order, while up to `ahead` of the following are on their way."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(max(1, ahead), thread_name_prefix="fetch") as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(task))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class SequentialReader:
    """The bytes from `start` to `stop` of an object, from front to back, fetched ahead of their use."""

    def __init__(self, reader: CheckedReader, start: int, stop: int, ahead: int) -> None:
        first = start - start % CHUNK_BYTES
        places = range(first, stop, CHUNK_BYTES)
        self._chunks = prefetched((partial(reader.chunk, place) for place in places), ahead)
        self._rest = memoryview(b"")
        self._skip = start - first

    def read(self, length: int) -> Bytes:
        """The next `length` bytes."""
        if length <= len(self._rest):
            return self._take(length)
        data = bytearray(length)
        filled = 0
        while filled < length:
            part = self._take(min(length - filled, len(self._rest)))
            data[filled : filled + len(part)] = part
            filled += len(part)
            if filled < length:
                self._rest = memoryview(next(self._chunks))[self._skip :]
                self._skip = 0
        return data

    def close(self) -> None:
        """Stop fetching."""
        del self._chunks

    def _take(self, length: int) -> memoryview:
        part, self._rest = self._rest[:length], self._rest[length:]
        return part

"""Parts of an object, each byte checked against the digests that its manifest promises."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from tributary_api.records import CHUNK_BYTES, FileDigest
from tributary_store.digests import check_chunk, spans
from tributary_store.errors import ObjectDamaged
from tributary_store.objects import Objects

CHUNKS_KEPT_MAX = 2
"""Tensors are read in the order of the file: the chunk that one ends in is the one where the next begins."""


@dataclass(slots=True)
class CheckedReader:
    """Reads an object by whole chunks of 16 MiB and keeps the last ones. Not for several threads."""

    store: Objects
    uri: str
    digest: FileDigest
    bytes_read: int = 0
    _chunks: OrderedDict[int, bytes] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        if len(self.digest.chunks) != len(list(spans(self.digest.size))):
            raise ObjectDamaged(f"{self.uri}: its manifest has not one digest for each {CHUNK_BYTES} bytes")

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`; ObjectDamaged if a chunk with some of them is not as published."""
        end = min(start + length, self.digest.size)
        parts = []
        for chunk_start in range(start - start % CHUNK_BYTES, end, CHUNK_BYTES):
            chunk = self._chunk(chunk_start)
            parts.append(chunk[max(start - chunk_start, 0) : end - chunk_start])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def chunks(self) -> Iterator[bytes]:
        """The whole object in order."""
        for start, length in spans(self.digest.size):
            yield self.read(start, length)

    def _chunk(self, start: int) -> bytes:
        if start not in self._chunks:
            length = min(CHUNK_BYTES, self.digest.size - start)
            data = self.store.get_range(self.uri, start, length)
            self.bytes_read += length
            check_chunk(self.uri, self.digest, start, data)
            self._chunks[start] = data
            while len(self._chunks) > CHUNKS_KEPT_MAX:
                self._chunks.popitem(last=False)
        return self._chunks[start]

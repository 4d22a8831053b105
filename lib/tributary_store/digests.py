"""Digests of files, chunk by chunk: a reader stops at the first wrong one, and a writer needs no second read.

A file is identified by its size and the digests of its chunks. There is none of the whole: it could only be
computed from front to back, by one thread.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from tributary_api.base import sha256_of
from tributary_api.records import CHUNK_BYTES, FileDigest
from tributary_store.errors import ObjectDamaged


def digest_of_file(path: Path, name: str | None = None) -> FileDigest:
    """The digest of a local file, under `name` or else the file's own name."""
    return digest_of_chunks(chunks_of(path), name or path.name)


def digest_of_bytes(data: bytes, name: str) -> FileDigest:
    return digest_of_chunks((data[start : start + length] for start, length in spans(len(data))), name)


def digest_of_chunks(chunks: Iterable[bytes], name: str) -> FileDigest:
    size, digests = 0, []
    for chunk in chunks:
        size += len(chunk)
        digests.append(sha256_of(chunk))
    return FileDigest(path=name, size=size, chunks=digests)


def chunks_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def spans(size: int, part_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """(start, length) of each part of `size` bytes."""
    return ((start, min(part_bytes, size - start)) for start in range(0, size, part_bytes))


def read_span(path: Path, start: int, length: int) -> bytes:
    """Part of a file, without a shared position, so that threads may read side by side."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, length, start)
    finally:
        os.close(descriptor)


def check_complete(uri: str, digest: FileDigest) -> None:
    """ObjectDamaged unless the manifest has a digest for every chunk."""
    if len(digest.chunks) != -(-digest.size // CHUNK_BYTES):
        raise ObjectDamaged(
            f"{uri}: its manifest has not one digest for each {CHUNK_BYTES} bytes; publish it again"
        )


def check_chunk(uri: str, expected: FileDigest, start: int, data: bytes) -> None:
    """Compare the chunk at byte `start` with its digest; ObjectDamaged names the chunk."""
    index = start // CHUNK_BYTES
    if index >= len(expected.chunks) or sha256_of(data) != expected.chunks[index]:
        raise ObjectDamaged(
            f"{uri}: bytes {start} to {start + len(data)} are not those that were published; "
            "publish the object again under a new key, or restore it from a copy"
        )

"""Digests of files: of the whole, and of each chunk, so that a reader can stop at the first wrong one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from tributary_api.base import sha256_of
from tributary_api.records import CHUNK_BYTES, FileDigest
from tributary_store.errors import ObjectDamaged


def digest_of_file(path: Path, name: str | None = None) -> FileDigest:
    """The digest of a local file, under `name` or else the file's own name."""
    return digest_of_chunks(_chunks_of(path), name or path.name)


def digest_of_bytes(data: bytes, name: str) -> FileDigest:
    starts = range(0, len(data), CHUNK_BYTES)
    return digest_of_chunks((data[start : start + CHUNK_BYTES] for start in starts), name)


def digest_of_chunks(chunks: Iterator[bytes], name: str) -> FileDigest:
    whole, size, digests = hashlib.sha256(), 0, []
    for chunk in chunks:
        whole.update(chunk)
        size += len(chunk)
        digests.append(sha256_of(chunk))
    return FileDigest(path=name, size=size, sha256=f"sha256:{whole.hexdigest()}", chunks=digests)


def _chunks_of(path: Path) -> Iterator[bytes]:
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


def check_chunk(uri: str, expected: FileDigest, start: int, data: bytes) -> None:
    """Compare the chunk at byte `start` with its digest; ObjectDamaged names the chunk."""
    index = start // CHUNK_BYTES
    if index >= len(expected.chunks) or sha256_of(data) != expected.chunks[index]:
        raise ObjectDamaged(
            f"{uri}: bytes {start} to {start + len(data)} are not those that were published; "
            "publish the object again under a new key, or restore it from a copy"
        )


def check_whole(uri: str, expected: FileDigest, found: FileDigest) -> None:
    if (found.size, found.sha256) != (expected.size, expected.sha256):
        raise ObjectDamaged(
            f"{uri}: {found.size} bytes with digest {found.sha256}, "
            f"expected {expected.size} bytes with digest {expected.sha256}"
        )

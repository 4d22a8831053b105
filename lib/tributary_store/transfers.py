"""Moving large objects in chunks, several at a time, each checked as it arrives."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tributary_api.records import FileDigest
from tributary_store.digests import check_chunk, check_complete, digest_of_chunks, spans
from tributary_store.errors import ObjectDamaged, ObjectMissing
from tributary_store.objects import Objects

TRANSFERS_PARALLEL = 4
"""Each holds one chunk of 16 MiB; one connection alone does not fill a network."""


def download(store: Objects, uri: str, path: Path, expected: FileDigest) -> None:
    """See `Objects.download`."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        check_complete(uri, expected)
        _check_size(store, uri, expected)
        _fetch_chunks(store, uri, partial, expected)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def has_bytes(store: Objects, uri: str, digest: FileDigest) -> bool:
    """Whether the object holds the bytes of this digest, by reading them; ObjectMissing if there is none."""
    if _size(store, uri) != digest.size:
        return False
    chunks = (store.get_range(uri, start, length) for start, length in spans(digest.size))
    return digest_of_chunks(chunks, uri).chunks == digest.chunks


def _fetch_chunks(store: Objects, uri: str, path: Path, expected: FileDigest) -> None:
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)

    def fetch(span: tuple[int, int]) -> None:
        data = store.get_range(uri, *span)
        check_chunk(uri, expected, span[0], data)
        os.pwrite(descriptor, data, span[0])

    try:
        with ThreadPoolExecutor(TRANSFERS_PARALLEL) as pool:
            # Consumed for its errors: the first one ends the download.
            for _ in pool.map(fetch, spans(expected.size)):
                pass
    finally:
        os.close(descriptor)


def _check_size(store: Objects, uri: str, expected: FileDigest) -> None:
    size = _size(store, uri)
    if size != expected.size:
        raise ObjectDamaged(f"{uri}: {size} bytes, expected {expected.size}")


def _size(store: Objects, uri: str) -> int:
    info = store.head(uri)
    if info is None:
        raise ObjectMissing(f"{uri}: there is no such object; check the URI and that it was uploaded")
    return info.size

"""The object store as a dictionary. It passes the suite of the real one (lib/test_objectstore.py)."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tributary_api.records import FileDigest
from tributary_store.digests import digest_of_bytes, digest_of_file
from tributary_store.errors import ObjectDamaged, ObjectExists, ObjectMissing
from tributary_store.objects import Bytes, ObjectInfo, bucket_and_key
from tributary_store.transfers import download


@dataclass
class MemoryUpload:
    store: MemoryStore
    uri: str
    data: bytearray = field(default_factory=bytearray)

    def write(self, data: Bytes) -> None:
        self.data += data

    def finish(self, name: str) -> FileDigest:
        self.abort()
        self.store.put_new(self.uri, bytes(self.data))
        return digest_of_bytes(bytes(self.data), name)

    def abort(self) -> None:
        if self.uri in self.store.unfinished:
            self.store.unfinished.remove(self.uri)


@dataclass
class MemoryStore:
    objects: dict[str, bytes] = field(default_factory=dict)
    retained: set[str] = field(default_factory=set)
    bytes_read: int = 0
    unfinished: list[str] = field(default_factory=list)
    """Where uploads were begun that are neither finished nor aborted."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, uri: str) -> bytes:
        bucket_and_key(uri)
        if uri not in self.objects:
            raise ObjectMissing(f"GET {uri}: there is no such object")
        self.bytes_read += len(self.objects[uri])
        return self.objects[uri]

    def get_range(self, uri: str, start: int, length: int) -> bytes:
        data = self.get(uri)[start : start + length]
        self.bytes_read -= len(self.objects[uri]) - len(data)
        if len(data) != length:
            raise ObjectDamaged(f"{uri}: the object is cut off")
        return data

    def head(self, uri: str) -> ObjectInfo | None:
        return ObjectInfo(uri, len(self.objects[uri])) if uri in self.objects else None

    def list(self, prefix_uri: str) -> Iterator[ObjectInfo]:
        uris = sorted(uri for uri in self.objects if uri.startswith(prefix_uri))
        return iter([ObjectInfo(uri, len(self.objects[uri])) for uri in uris])

    def put_new(self, uri: str, data: bytes, *, retain: bool = False) -> bool:
        bucket_and_key(uri)
        with self._lock:
            if uri not in self.objects:
                self.objects[uri] = bytes(data)
                self.retained |= {uri} if retain else set()
                return True
        if self.objects[uri] != data:
            raise ObjectExists(f"{uri} exists already with other bytes")
        return False

    def upload_new(self, uri: str, path: Path) -> FileDigest:
        self.put_new(uri, path.read_bytes())
        return digest_of_file(path)

    def begin(self, uri: str) -> MemoryUpload:
        self.unfinished.append(uri)
        return MemoryUpload(self, uri)

    def discard_unfinished(self, uri: str) -> int:
        left = self.unfinished.count(uri)
        self.unfinished = [other for other in self.unfinished if other != uri]
        return left

    def download(self, uri: str, path: Path, expected: FileDigest) -> None:
        download(self, uri, path, expected)

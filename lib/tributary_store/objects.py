"""What the rest of Tributary asks of an object store. `ObjectStore` is the real one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tributary_api.records import FileDigest
from tributary_store.errors import StoreError

Bytes = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object as a listing shows it; `size` in bytes."""

    uri: str
    size: int


class Upload(Protocol):
    """An object on its way, written from front to back. It exists once it is finished."""

    def write(self, data: Bytes) -> None:
        """Add to the end; the caller may use its buffer again at once."""
        ...

    def finish(self, name: str) -> FileDigest:
        """Create the object by the rules of `put_new`; gives its digest, under `name`."""
        ...

    def abort(self) -> None:
        """Leave nothing behind."""
        ...


class Objects(Protocol):
    """Create-only writes and checked reads. Every method raises the errors of `tributary_store.errors`."""

    def get(self, uri: str) -> bytes:
        """The whole object."""
        ...

    def get_range(self, uri: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`; ObjectDamaged if the object ends before."""
        ...

    def head(self, uri: str) -> ObjectInfo | None:
        """The object's size, or None if there is no such object."""
        ...

    def list(self, prefix_uri: str) -> Iterator[ObjectInfo]:
        """Every object whose URI starts with the prefix, in the order of the keys."""
        ...

    def put_new(self, uri: str, data: bytes, *, retain: bool = False) -> bool:
        """Create an object that never changes.

        True: it holds `data` now, by this call. False: it held the same before. Other bytes: ObjectExists.
        `retain` makes the store refuse overwriting and deletion by anybody, where the bucket has Object Lock.
        """
        ...

    def upload_new(self, uri: str, path: Path) -> FileDigest:
        """Create an object from a file of any size, by the rules of `put_new`; gives the file's digest."""
        ...

    def begin(self, uri: str) -> Upload:
        """Start to create an object of a size that is not known yet."""
        ...

    def discard_unfinished(self, uri: str) -> int:
        """Remove what killed writers of this object have left at the store; gives how many there were."""
        ...

    def download(self, uri: str, path: Path, expected: FileDigest) -> None:
        """Write the object to `path`, which appears only if every byte is as expected; else ObjectDamaged."""
        ...


def bucket_and_key(uri: str) -> tuple[str, str]:
    """Split s3://bucket/key; the key may be empty."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not uri.startswith("s3://") or not bucket:
        raise StoreError(f"{uri!r} is not an object's URI: write s3://bucket/key")
    return bucket, key

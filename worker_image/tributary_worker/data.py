"""A client's private records: read, split and brought to exactly the declared number.

What is wrong with a single record stays here: it keeps its place and is empty, so it contributes nothing and
is not reported. Which records are trained on, and in what order, follows from their places alone: were it
from what is in them, emptying one record would let another in. Only faults of the data set as a whole
surface, as a reason without a word of the data.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow
import pyarrow.parquet

from tributary_api.base import canonical_json
from tributary_api.client import ClientData
from tributary_api.failures import Reason
from tributary_store.errors import StoreError
from tributary_store.objects import Objects
from tributary_worker.failures import StageFailure

IGNORED_NAME_PREFIXES = ("_", ".")
"""Markers such as _SUCCESS and hidden files are not data (a convention of Hadoop and Spark)."""

PVC_SCHEME = "pvc://"
HASH_VALUES = 2**64


@dataclass(frozen=True, slots=True)
class Record:
    """One record. `text` is None for one that could not be read; `key` is the SHA-256 of its place."""

    key: bytes
    text: str | None
    label: int | None = None


@dataclass(frozen=True, slots=True)
class PrivateData:
    """Exactly `num_examples` training records, and the digest (hex) of all the bytes that they were read
    from."""

    records: list[Record]
    snapshot_hash: str


class Files(Protocol):
    """Where a data set's files come from."""

    def read(self) -> Iterator[tuple[str, bytes]]:
        """(name, content) of each file, in the order of the names."""
        ...


@dataclass(frozen=True, slots=True)
class StoredFiles:
    """The objects under an S3 prefix, or the one object of that name."""

    store: Objects
    uri: str

    def read(self) -> Iterator[tuple[str, bytes]]:
        for item in self.store.list(self.uri):
            if _is_data(item.uri):
                yield item.uri.removeprefix(self.uri), self.store.get(item.uri)


@dataclass(frozen=True, slots=True)
class MountedFiles:
    """The files under a directory, or a single file, of a mounted volume."""

    path: Path

    def read(self) -> Iterator[tuple[str, bytes]]:
        paths = [self.path] if self.path.is_file() else sorted(p for p in self.path.rglob("*") if p.is_file())
        if not self.path.exists():
            raise FileNotFoundError
        for path in paths:
            if _is_data(path.name):
                yield _as_text(path.relative_to(self.path)), path.read_bytes()


def _as_text(path: Path) -> str:
    """A file's name as UTF-8, which a volume does not promise."""
    return os.fsencode(path).decode(errors="backslashreplace")


def files_of(data: ClientData, store: Objects, mount: Path) -> Files:
    """The files that a data URI names; `mount` is where the claim of a pvc:// URI is mounted."""
    if data.uri.startswith(PVC_SCHEME):
        _, _, path = data.uri.removeprefix(PVC_SCHEME).partition("/")
        return MountedFiles(mount / path)
    return StoredFiles(store, data.uri)


def read_private_data(files: Files, data: ClientData, num_examples: int) -> PrivateData:
    """Read everything, keep the training part, cut or pad it to the number that the accountant counts on.

    Raises:
        StageFailure: the data set as a whole is unreachable, empty or unreadable.
    """
    digest, records = hashlib.sha256(), list[Record]()
    try:
        for name, content in files.read():
            digest.update(canonical_json([name, hashlib.sha256(content).hexdigest()]))
            records.extend(parse(name, content, data))
    except (StoreError, OSError) as error:
        # The error's own text would name single files, which may be as private as what is in them.
        raise StageFailure(
            Reason.DATA_UNREACHABLE,
            f"{data.uri} cannot be read ({type(error).__name__}): check data.uri and the credentials",
        ) from error
    _check_usable(records, data)
    training = [record for record in records if not is_held_out(record, float(data.holdout_fraction))]
    return PrivateData(exactly(training, num_examples), digest.hexdigest())


def _check_usable(records: list[Record], data: ClientData) -> None:
    if not records:
        raise StageFailure(Reason.DATA_EMPTY, f"{data.uri} holds no records: check data.uri and data.format")
    if all(record.text is None for record in records):
        raise StageFailure(
            Reason.DATA_UNPARSEABLE,
            f"nothing in {data.uri} reads as {data.format} with the field {data.text_field!r}: "
            "check data.format and data.textField",
        )


def is_held_out(record: Record, fraction: float) -> bool:
    """Whether a record is kept apart from training: by its place, hence the same in every round."""
    return int.from_bytes(record.key[:8], "big") < fraction * HASH_VALUES


def exactly(records: Iterable[Record], count: int) -> list[Record]:
    """`count` records: in the order of their keys, cut, or padded with empty ones.

    The order is as good as random, so that what is cut is not always the last file.
    """
    kept = sorted(records, key=lambda record: record.key)[:count]
    return kept + [Record(b"", None)] * (count - len(kept))


def parse(name: str, content: bytes, data: ClientData) -> Iterator[Record]:
    """The records of one file; `name` is relative to data.uri."""
    return (
        _record(place_key(name, index), fields, data) for index, fields in enumerate(_fields(content, data))
    )


def place_key(name: str, index: int) -> bytes:
    """SHA-256 of a record's place: the file's name, and the index of the line or row in it."""
    return hashlib.sha256(canonical_json([name, index])).digest()


def _fields(content: bytes, data: ClientData) -> Iterator[Any]:
    """What each line, row or file holds; None for one that cannot be read."""
    match data.format:
        case "jsonl":
            return map(_json_fields, _lines(content))
        case "parquet":
            return _parquet_rows(content, data)
        case "text":
            return iter([{data.text_field: _decoded(content)}])


def _lines(content: bytes) -> list[bytes]:
    """Blank ones too: dropping one would move those after it."""
    lines = content.split(b"\n")
    return lines if lines[-1] else lines[:-1]


def _record(key: bytes, fields: Any, data: ClientData) -> Record:
    """The record of what was read; an empty one if its fields are not what they should be."""
    text = fields.get(data.text_field) if isinstance(fields, dict) else None
    if not isinstance(text, str) or not text.strip():
        return Record(key, None)
    if data.label_field is None:
        return Record(key, text)
    label = fields.get(data.label_field)
    is_class = isinstance(label, int) and not isinstance(label, bool) and label >= 0
    return Record(key, text if is_class else None, label if is_class else None)


def _json_fields(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _decoded(content: bytes) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _parquet_rows(content: bytes, data: ClientData) -> Iterator[dict[str, Any]]:
    wanted = [name for name in (data.text_field, data.label_field) if name]
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content), columns=wanted)
    except (pyarrow.ArrowException, OSError):
        # One damaged file is a bad record; a data set of nothing else is reported as a whole.
        return iter([{}])
    columns = [
        (name, map(_cell, cells)) for name, cells in zip(table.column_names, table.columns, strict=True)
    ]
    return ({name: next(cells) for name, cells in columns} for _ in range(table.num_rows))


def _cell(cell: Any) -> Any:
    """One value of a table. Parquet does not check that its strings are UTF-8, nor that its dates exist."""
    try:
        return cell.as_py()
    except (ValueError, OverflowError):
        return None


def _is_data(name: str) -> bool:
    leaf = name.rsplit("/", 1)[-1]
    return bool(leaf) and not leaf.startswith(IGNORED_NAME_PREFIXES)

"""Public data sets: a JSON object a line, with `text` and, for classification, `label`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from tributary_api.base import sha256_of
from tributary_api.failures import Reason
from tributary_api.shared import DatasetRef, TaskKind
from tributary_store.objects import Objects
from tributary_worker.failures import StageFailure

ID_HEX_DIGITS = 16


@dataclass(frozen=True, slots=True)
class Document:
    """A public text, and its class if the task is classification. `name` is the contract's id of the text."""

    name: str
    text: str
    label: int | None = None


def read_documents(store: Objects, ref: DatasetRef, task: TaskKind) -> list[Document]:
    """The documents of a public data set, in its order.

    Raises StageFailure if the bytes are not those of the digest, or a line is not a document; a StoreError
    goes through.
    """
    data = store.get(ref.uri)
    found = sha256_of(data)
    if found != ref.digest:
        raise StageFailure(
            Reason.DATASET_DIGEST_MISMATCH,
            f"{ref.uri} has digest {found}, not {ref.digest}: correct dataset.digest, or restore the object",
        )
    lines = [(n, line) for n, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    if not lines:
        raise StageFailure(Reason.DATA_EMPTY, f"{ref.uri} holds no documents: check dataset.uri")
    return [_document(f"{ref.uri} line {n}", line, task) for n, line in lines]


def _document(place: str, line: bytes, task: TaskKind) -> Document:
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise _unparseable(f"{place} is not JSON ({error})") from error
    text = fields.get("text") if isinstance(fields, dict) else None
    if not isinstance(text, str):
        raise _unparseable(f"{place} has no string in the field 'text'")
    try:
        name = hashlib.sha256(text.encode()).hexdigest()[:ID_HEX_DIGITS]
    except UnicodeEncodeError as error:
        raise _unparseable(f"{place} holds half a surrogate pair, which is no text") from error
    return Document(name, text, _label(place, fields) if task is TaskKind.SEQUENCE_CLASSIFICATION else None)


def _label(place: str, fields: dict[str, Any]) -> int:
    label = fields.get("label")
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        raise _unparseable(f"{place} has no whole number from 0 in the field 'label'")
    return label


def _unparseable(message: str) -> StageFailure:
    return StageFailure(Reason.DATA_UNPARSEABLE, message)

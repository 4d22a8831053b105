"""The clients' deltas before any of their values is read: is each the one that was granted, and in good form?

Of each the manifest and the header are read. The header comes unchecked; whoever reads the first chunk
compares it, and the aggregation's records lie under a key that its digest is part of.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from pydantic import ValidationError

from tributary_accounting.signatures import SignatureRefused, verify
from tributary_api.aggregation import DeltaEncoding
from tributary_api.base import sha256_of
from tributary_api.failures import Reason
from tributary_api.meta import NamespacedName
from tributary_api.records import CHUNK_BYTES, DeltaManifest
from tributary_api.tasks import AggregateTask, DeltaInput
from tributary_store.digests import check_complete
from tributary_store.errors import ObjectDamaged, ObjectMissing
from tributary_store.objects import Objects
from tributary_store.tensors import TensorHeader, read_header
from tributary_worker.aggregation.encodings import EncodingError, StoredTensor, stored_tensor

ANY_ENCODING = tuple(DeltaEncoding)
EXACT = (DeltaEncoding.FLOAT32,)
HEADER_BYTES_USUAL = 1 << 18
"""Fetched at first: the header of a few thousand tensors."""


class Rejection(StrEnum):
    """Why a client's delta is not used."""

    MISSING = "DeltaMissing"
    DAMAGED = "DeltaDamaged"
    FOREIGN = "GrantMismatch"
    UNSIGNED = "SignatureRefused"
    MALFORMED = "DeltaMalformed"
    TOO_LARGE = "NormTooLarge"
    NORM_MISMATCH = "NormMismatch"
    NON_FINITE = Reason.NON_FINITE_DELTA


class DeltaRejectedError(Exception):
    """The delta of `client` is not used; the round goes on with the others."""

    def __init__(self, client: NamespacedName, reason: Rejection, message: str) -> None:
        super().__init__(message)
        self.client = client
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """A tensor that a delta must have, or may have; `digest` if its values are known beforehand."""

    shape: tuple[int, ...]
    is_required: bool = True
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """A delta whose manifest and header are in order."""

    client: NamespacedName
    weight: float
    uri: str
    manifest: DeltaManifest
    tensors: Mapping[str, StoredTensor]
    header_bytes: bytes

    @property
    def fingerprint(self) -> str:
        """Digest of what decides about its values."""
        return sha256_of(self.manifest.canonical_json() + self.header_bytes)


def inspect(
    store: Objects, task: AggregateTask, delta: DeltaInput, expected: Mapping[str, ExpectedTensor]
) -> Delta:
    """Read and check manifest and header. DeltaRejectedError says why the delta cannot be used.

    A StoreError of the network or of permissions goes through: it says nothing about the delta.
    """
    try:
        manifest = _manifest(store, task, delta)
        check_complete(delta.delta_uri, manifest.file)
        header, header_bytes = _header(store, delta.delta_uri, manifest.file.size)
    except ObjectMissing as error:
        raise DeltaRejectedError(delta.client, Rejection.MISSING, str(error)) from error
    except ObjectDamaged as error:
        raise DeltaRejectedError(delta.client, Rejection.DAMAGED, str(error)) from error
    try:
        tensors = _stored_tensors(header, expected)
    except EncodingError as error:
        raise DeltaRejectedError(delta.client, Rejection.MALFORMED, str(error)) from error
    return Delta(delta.client, delta.weight, delta.delta_uri, manifest, tensors, header_bytes)


def _manifest(store: Objects, task: AggregateTask, delta: DeltaInput) -> DeltaManifest:
    uri = delta.manifest_uri
    try:
        manifest = DeltaManifest.model_validate_json(store.get(uri))
    except ValidationError as error:
        message = f"{uri} is not a delta's manifest"
        raise DeltaRejectedError(delta.client, Rejection.DAMAGED, message) from error
    stated = (manifest.run_key, manifest.client, manifest.base_model_digest, manifest.receipt.grant_digest)
    due = (task.run_key, delta.client, task.base_model.digest, delta.grant_digest)
    for name, is_value, due_value in zip(("run", "client", "base model", "grant"), stated, due, strict=True):
        if is_value != due_value:
            message = f"{uri} is for {name} {is_value}, not {due_value}"
            raise DeltaRejectedError(delta.client, Rejection.FOREIGN, message)
    try:
        verify(manifest, manifest.signature, delta.receipt_key)
    except SignatureRefused as error:
        raise DeltaRejectedError(delta.client, Rejection.UNSIGNED, f"{uri}: {error}") from error
    return manifest


def _header(store: Objects, uri: str, size: int) -> tuple[TensorHeader, bytes]:
    head = store.get_range(uri, 0, min(size, HEADER_BYTES_USUAL))

    def read(start: int, length: int) -> bytes:
        is_at_hand = start + length <= len(head)
        return head[start : start + length] if is_at_hand else store.get_range(uri, start, length)

    header = read_header(uri, size, read)
    end = min((info.start for info in header.tensors.values()), default=size)
    if end > CHUNK_BYTES:
        raise ObjectDamaged(f"{uri}: its header is longer than {CHUNK_BYTES} bytes, as no model's is")
    return header, read(0, end)


def _stored_tensors(header: TensorHeader, expected: Mapping[str, ExpectedTensor]) -> dict[str, StoredTensor]:
    """The tensors of a delta by name. EncodingError if names, shapes or types are not those expected."""
    required = {name for name, tensor in expected.items() if tensor.is_required}
    if missing := sorted(required - header.tensors.keys()):
        raise EncodingError(f"no tensor {_some(missing)}")
    stored = {
        name: stored_tensor(
            header.tensors, name, tensor.shape, ANY_ENCODING if tensor.digest is None else EXACT
        )
        for name, tensor in expected.items()
        if name in header.tensors
    }
    known = {part.name for tensor in stored.values() for part in tensor.parts}
    if surplus := sorted(header.tensors.keys() - known):
        raise EncodingError(f"tensor {_some(surplus)} belongs to no trained weight")
    return stored


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"

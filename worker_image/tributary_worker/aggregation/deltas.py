"""The clients' deltas: which of them may be used, and the tensors of those that may.

Each delta is read twice. The first time every byte is checked against the manifest, and a delta that fails is
left out by name. The second time one tensor after the other is read for the mean, and checked against the
digest that it had the first time: a delta cannot change in between.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from pydantic import ValidationError

from tributary_accounting.signatures import SignatureRefused, verify
from tributary_api.base import sha256_of
from tributary_api.failures import Reason
from tributary_api.meta import NamespacedName
from tributary_api.records import DeltaManifest
from tributary_api.tasks import AggregateTask, DeltaInput
from tributary_store.digests import spans
from tributary_store.errors import ObjectDamaged, ObjectMissing
from tributary_store.objects import Objects
from tributary_store.tensors import TensorHeader, TensorInfo, read_header
from tributary_worker.aggregation.numbers import Array, decode
from tributary_worker.aggregation.reader import CheckedReader
from tributary_worker.failures import StageFailure

DELTA_DTYPE = "F32"
"""Noise is drawn and added in this precision, so a delta comes in no other."""


class Rejection(StrEnum):
    """Why a client's delta is not used."""

    MISSING = "DeltaMissing"
    DAMAGED = "DeltaDamaged"
    FOREIGN = "GrantMismatch"
    UNSIGNED = "SignatureRefused"
    MALFORMED = "DeltaMalformed"
    NON_FINITE = Reason.NON_FINITE_DELTA


class DeltaRejectedError(Exception):
    """This delta is not used; the round goes on with the others."""

    def __init__(self, reason: Rejection, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """A tensor that a delta must have, or may have; `digest` if its values are known beforehand."""

    shape: tuple[int, ...]
    is_required: bool = True
    digest: str | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """A delta that passed every check."""

    store: Objects
    client: NamespacedName
    weight: float
    uri: str
    tensors: Mapping[str, TensorInfo]
    digests: Mapping[str, str]
    bytes_read: int
    """Of both times."""

    def read(self, name: str) -> Array:
        """One tensor as float64, in its shape."""
        info = self.tensors[name]
        data = self.store.get_range(self.uri, info.start, info.length)
        if sha256_of(data) != self.digests[name]:
            raise StageFailure(
                Reason.MODEL_DIGEST_MISMATCH, f"{self.uri} was changed while it was read", retryable=True
            )
        return decode(data, info.dtype).reshape(info.shape)


def inspect(
    store: Objects, task: AggregateTask, delta: DeltaInput, expected: Mapping[str, ExpectedTensor]
) -> Delta:
    """Check every byte of a delta. DeltaRejectedError says why it cannot be used.

    A StoreError of the network or of permissions goes through: it says nothing about the delta.
    """
    try:
        manifest = _manifest(store, task, delta)
        reader = CheckedReader(store, delta.delta_uri, manifest.file)
        header = read_header(delta.delta_uri, manifest.file.size, reader.read)
        _check_header(header, expected)
        digests = {name: _scan(reader, info) for name, info in header.tensors.items()}
    except ObjectMissing as error:
        raise DeltaRejectedError(Rejection.MISSING, str(error)) from error
    except ObjectDamaged as error:
        raise DeltaRejectedError(Rejection.DAMAGED, str(error)) from error
    _check_known_values(digests, expected)
    return Delta(
        store=store,
        client=delta.client,
        weight=delta.weight,
        uri=delta.delta_uri,
        tensors=header.tensors,
        digests=digests,
        bytes_read=reader.bytes_read + sum(info.length for info in header.tensors.values()),
    )


def _manifest(store: Objects, task: AggregateTask, delta: DeltaInput) -> DeltaManifest:
    try:
        manifest = DeltaManifest.model_validate_json(store.get(delta.manifest_uri))
    except ValidationError as error:
        raise DeltaRejectedError(
            Rejection.DAMAGED, f"{delta.manifest_uri} is not a delta's manifest"
        ) from error
    stated = (manifest.run_key, manifest.client, manifest.base_model_digest, manifest.receipt.grant_digest)
    due = (task.run_key, delta.client, task.base_model.digest, delta.grant_digest)
    for name, is_value, due_value in zip(("run", "client", "base model", "grant"), stated, due, strict=True):
        if is_value != due_value:
            raise DeltaRejectedError(
                Rejection.FOREIGN, f"{delta.manifest_uri} is for {name} {is_value}, not {due_value}"
            )
    try:
        verify(manifest, manifest.signature, delta.receipt_key)
    except SignatureRefused as error:
        raise DeltaRejectedError(Rejection.UNSIGNED, f"{delta.manifest_uri}: {error}") from error
    return manifest


def _check_header(header: TensorHeader, expected: Mapping[str, ExpectedTensor]) -> None:
    required = {name for name, tensor in expected.items() if tensor.is_required}
    if missing := sorted(required - header.tensors.keys()):
        raise DeltaRejectedError(Rejection.MALFORMED, f"no tensor {_some(missing)}")
    if surplus := sorted(header.tensors.keys() - expected.keys()):
        raise DeltaRejectedError(Rejection.MALFORMED, f"tensor {_some(surplus)} belongs to no trained weight")
    for name, info in header.tensors.items():
        if info.shape != expected[name].shape:
            raise DeltaRejectedError(
                Rejection.MALFORMED, f"tensor {name} has shape {info.shape}, not {expected[name].shape}"
            )
        if info.dtype != DELTA_DTYPE:
            raise DeltaRejectedError(
                Rejection.MALFORMED, f"tensor {name} has type {info.dtype}, not {DELTA_DTYPE}"
            )


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def _scan(reader: CheckedReader, info: TensorInfo) -> str:
    """The digest of a tensor, all of whose elements are finite."""
    digest = hashlib.sha256()
    for start, length in spans(info.length):
        data = reader.read(info.start + start, length)
        digest.update(data)
        if not np.isfinite(np.frombuffer(data, "<f4")).all():
            raise DeltaRejectedError(Rejection.NON_FINITE, f"tensor {info.name} is not finite")
    return f"sha256:{digest.hexdigest()}"


def _check_known_values(digests: Mapping[str, str], expected: Mapping[str, ExpectedTensor]) -> None:
    for name, digest in digests.items():
        known = expected[name].digest
        if known is not None and digest != known:
            raise DeltaRejectedError(
                Rejection.FOREIGN, f"tensor {name} is not the frozen one that this run's key gives"
            )

"""The object store as a stage reaches it: opened from its task and environment, its errors as failures."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from pydantic import ValidationError

from tributary_api.base import ApiModel
from tributary_api.failures import Reason
from tributary_api.shared import StoreEndpoint
from tributary_store import errors
from tributary_store.objects import Objects
from tributary_store.objectstore import ObjectStore
from tributary_worker.failures import StageFailure

ACCESS_KEY = "AWS_ACCESS_KEY_ID"
SECRET_KEY = "AWS_SECRET_ACCESS_KEY"

RecordT = TypeVar("RecordT", bound=ApiModel)


def open_store(endpoint: StoreEndpoint, credentials_prefix: str = "") -> ObjectStore:
    """The store under the identity of <prefix>AWS_ACCESS_KEY_ID and _SECRET_ACCESS_KEY, or the pod's own."""
    access_key = os.environ.get(credentials_prefix + ACCESS_KEY)
    secret_key = os.environ.get(credentials_prefix + SECRET_KEY)
    return ObjectStore.open(endpoint, access_key, secret_key)


@contextmanager
def store_failures(
    *, missing: Reason = Reason.MODEL_MISSING, damaged: Reason = Reason.MODEL_DIGEST_MISMATCH
) -> Iterator[None]:
    """Within, an error of the store ends the stage with its reason.

    `missing` and `damaged` say what it means here that an object is absent, or does not match its digest.
    """
    try:
        yield
    except errors.StoreError as error:
        raise StageFailure(_reason(error, missing, damaged), str(error)) from error
    except ValidationError as error:
        message = f"a {error.title} in the store is not readable ({error.error_count()} errors)"
        raise StageFailure(
            Reason.TASK_INVALID, f"{message}: another version or somebody else wrote it; create another round"
        ) from error


def record_once(
    store: Objects, uri: str, kind: type[RecordT], make: Callable[[], RecordT], log: Any
) -> RecordT:
    """The create-only record at `uri`: an earlier attempt's, or the one that `make` computes now."""
    with store_failures():
        if store.head(uri) is None:
            record = make()
            try:
                store.put_new(uri, record.canonical_json(), retain=True)
            except errors.ObjectExists:
                log.info("another attempt was faster", record=uri)
        return kind.model_validate_json(store.get(uri))


def _reason(error: errors.StoreError, missing: Reason, damaged: Reason) -> Reason:
    match error:
        case errors.ObjectMissing():
            return missing
        case errors.ObjectDamaged():
            return damaged
        case errors.AccessDenied():
            return Reason.STORE_DENIED
        case errors.StoreUnreachable():
            return Reason.STORE_UNREACHABLE
        case errors.BundleRefused():
            return Reason.MODEL_UNSUPPORTED
        case _:
            # An object that exists with other bytes, or a malformed URI: another attempt would meet it again.
            return Reason.TASK_INVALID

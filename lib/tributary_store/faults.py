"""The errors of S3 and of the network in our own words: what failed, on which object, and what to change."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

import botocore.exceptions as aws

from tributary_store.errors import (
    AccessDenied,
    CredentialsRefused,
    ObjectExists,
    ObjectMissing,
    StoreError,
    StoreUnreachable,
)

MISSING_CODES = frozenset({"NoSuchKey", "404", "NotFound"})
CREDENTIAL_CODES = frozenset(
    {"InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "RequestTimeTooSkewed"}
)
LOST_RACE_STATUS = frozenset({HTTPStatus.PRECONDITION_FAILED, HTTPStatus.CONFLICT})
"""412: somebody created the object before us; 409: is doing so at this moment."""
BUSY_CODES = frozenset(
    {"SlowDown", "RequestTimeout", "RequestTimeoutException", "Throttling", "InternalError"}
)
NO_CREDENTIALS = (
    aws.NoCredentialsError,
    aws.PartialCredentialsError,
    aws.CredentialRetrievalError,
    aws.NoAuthTokenError,
)


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked, of whom, as whom: all that an error message needs."""

    action: str
    uri: str
    endpoint: str
    identity: str


def code_of(error: aws.ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: aws.ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def is_missing(error: aws.ClientError) -> bool:
    return code_of(error) in MISSING_CODES


def explained(error: Exception, request: Request) -> StoreError:
    """The same error, as the caller of the store should see it."""
    if isinstance(error, aws.ClientError):
        return _answered(error, request)
    if isinstance(error, NO_CREDENTIALS):
        return AccessDenied(
            f"{request.action} {request.uri}: no credentials for {request.endpoint} ({error}); "
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the service account a workload identity"
        )
    if isinstance(error, aws.ParamValidationError):
        return StoreError(f"{request.action} {request.uri}: {error}")
    return StoreUnreachable(
        f"{request.action} {request.uri}: no answer from {request.endpoint} ({error}); "
        "check the endpoint, its certificate and the network policy between here and there"
    )


def _answered(error: aws.ClientError, request: Request) -> StoreError:
    code, status = code_of(error), status_of(error)
    what = f"{request.action} {request.uri} at {request.endpoint}"
    if code == "NoSuchBucket":
        return ObjectMissing(f"{what}: there is no such bucket; create it, or correct the URI")
    if is_missing(error):
        return ObjectMissing(f"{what}: there is no such object; check the URI and that it was uploaded")
    if status in LOST_RACE_STATUS:
        return ObjectExists(f"{what}: somebody has created this object, or is doing so")
    if code in CREDENTIAL_CODES or status == HTTPStatus.FORBIDDEN:
        return _denied(what, code, request.identity)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or code in BUSY_CODES:
        return StoreUnreachable(f"{what}: the store answered {status} {code}; try again later")
    return StoreError(f"{what}: the store answered {status} {code}: {error}")


def _denied(what: str, code: str, identity: str) -> AccessDenied:
    if code in CREDENTIAL_CODES:
        return CredentialsRefused(
            f"{what}: the store refuses the credentials of {identity} ({code}); "
            "correct the Secret that holds them"
        )
    return AccessDenied(
        f"{what}: {identity} may not do this; allow it in the bucket policy or use another identity"
    )

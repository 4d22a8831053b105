"""An S3 store through boto3: create-only writes, ranged reads, errors that say what to change.

Everything durable is written once under `If-None-Match: *`. An answer can get lost on the way, and a retried
write then meets its own object; so a refused or unanswered write reads the object back, and the same bytes
count as success. (Where Object Lock protects the object, the answer may be 403 in place of 412.)
One `ObjectStore` may be used from several threads.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tributary_api.records import FileDigest
from tributary_api.shared import StoreEndpoint
from tributary_store.digests import chunks_of, digest_of_file
from tributary_store.errors import (
    AccessDenied,
    CredentialsRefused,
    ObjectDamaged,
    ObjectExists,
    ObjectMissing,
    StoreError,
    StoreUnreachable,
)
from tributary_store.faults import Request, code_of, explained, is_missing, status_of
from tributary_store.objects import ObjectInfo, bucket_and_key
from tributary_store.transfers import TRANSFERS_PARALLEL, download, has_bytes
from tributary_store.uploads import ChunkedUpload, Hooks, discard_unfinished

if TYPE_CHECKING:
    from botocore.response import StreamingBody
    from types_boto3_s3 import S3Client

CONNECT_TIMEOUT_SECONDS = 5
READ_TIMEOUT_SECONDS = 60
REQUEST_ATTEMPTS_MAX = 4
BODY_ATTEMPTS_MAX = 3
"""boto3 repeats a request, but not one whose body broke off."""
RETENTION = timedelta(days=3653)
"""Ten years: longer than anyone keeps a model, so a retained record outlives what it is about."""
NO_OBJECT_LOCK_STATUS = frozenset(
    {HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED, HTTPStatus.BAD_REQUEST}
)


@dataclass(slots=True)
class ObjectStore:
    """The `Objects` of one S3 endpoint under one identity. Make it with `open`."""

    endpoint: str
    identity: str
    _client: S3Client
    _locked_buckets: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def open(
        cls, endpoint: StoreEndpoint, access_key: str | None = None, secret_key: str | None = None
    ) -> ObjectStore:
        """Connect lazily; without keys, with those of the environment or the workload identity."""
        session = boto3.Session(aws_access_key_id=access_key, aws_secret_access_key=secret_key)
        client: S3Client = session.client(
            "s3", region_name=endpoint.region, endpoint_url=endpoint.endpoint, config=_config(endpoint)
        )
        credentials = session.get_credentials()
        identity = f"identity {credentials.access_key}" if credentials else "nobody (no credentials found)"
        return cls(endpoint.endpoint or "AWS", identity, client)

    def get(self, uri: str) -> bytes:
        return self._read(uri)

    def get_range(self, uri: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        data = self._read(uri, Range=f"bytes={start}-{start + length - 1}")
        if len(data) != length:
            raise ObjectDamaged(
                f"{uri}: {len(data)} bytes from {start} on, expected {length}: the object is cut off"
            )
        return data

    def head(self, uri: str) -> ObjectInfo | None:
        bucket, key = bucket_and_key(uri)
        try:
            answer = self._client.head_object(Bucket=bucket, Key=key)
        except (ClientError, BotoCoreError) as error:
            explanation = self._explained(error, "HEAD", uri)
            if isinstance(error, ClientError) and is_missing(error):
                return None
            if isinstance(explanation, AccessDenied) and self._is_absent(uri):
                return None
            raise explanation from error
        return ObjectInfo(uri, answer["ContentLength"])

    def _is_absent(self, uri: str) -> bool:
        """Whether a denied object does not exist: AWS says 403 unless it may list the whole bucket.

        False if that cannot be known. CredentialsRefused says more than a denied HEAD, which has no body.
        """
        try:
            return all(info.uri != uri for info in self.list(uri))
        except CredentialsRefused:
            raise
        except StoreError:
            return False

    def list(self, prefix_uri: str) -> Iterator[ObjectInfo]:
        bucket, prefix = bucket_and_key(prefix_uri)
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        try:
            for page in pages:
                for item in page.get("Contents", ()):
                    yield ObjectInfo(f"s3://{bucket}/{item['Key']}", item["Size"])
        except (ClientError, BotoCoreError) as error:
            raise self._explained(error, "LIST", prefix_uri) from error

    def put_new(self, uri: str, data: bytes, *, retain: bool = False) -> bool:
        bucket, key = bucket_and_key(uri)
        lock = self._retention(bucket) if retain else {}
        try:
            self._client.put_object(
                Bucket=bucket, Key=key, Body=data, IfNoneMatch="*", ChecksumSHA256=_checksum(data), **lock
            )
        except (ClientError, BotoCoreError) as error:
            return self._settled(error, uri, lambda: self.get(uri) == data)
        return True

    def upload_new(self, uri: str, path: Path) -> FileDigest:
        if self.head(uri) is not None:
            digest = digest_of_file(path)
            if not has_bytes(self, uri, digest):
                raise ObjectExists(_other_bytes(uri))
            return digest
        upload = self.begin(uri)
        try:
            for chunk in chunks_of(path):
                upload.write(chunk)
            return upload.finish(path.name)
        except BaseException:
            upload.abort()
            raise

    def begin(self, uri: str) -> ChunkedUpload:
        hooks = Hooks(
            put=lambda data: self.put_new(uri, data),
            explain=lambda error: self._explained(error, "PUT", uri),
            settle=lambda error, file: self._settled(error, uri, lambda: has_bytes(self, uri, file)),
        )
        return ChunkedUpload(self._client, uri, hooks)

    def discard_unfinished(self, uri: str) -> int:
        try:
            return discard_unfinished(self._client, uri)
        except (ClientError, BotoCoreError) as error:
            raise self._explained(error, "LIST UPLOADS", uri) from error

    def download(self, uri: str, path: Path, expected: FileDigest) -> None:
        download(self, uri, path, expected)

    def _read(self, uri: str, **span: str) -> bytes:
        broken: BotoCoreError | None = None
        for _ in range(BODY_ATTEMPTS_MAX):
            body = self._body(uri, span)
            try:
                return body.read()
            except BotoCoreError as error:
                broken = error
        raise self._explained(broken or RuntimeError(), "GET", uri) from broken

    def _body(self, uri: str, span: Mapping[str, Any]) -> StreamingBody:
        bucket, key = bucket_and_key(uri)
        try:
            return self._client.get_object(Bucket=bucket, Key=key, **span)["Body"]
        except (ClientError, BotoCoreError) as error:
            if isinstance(error, ClientError) and code_of(error) == "InvalidRange":
                raise ObjectDamaged(f"{uri}: the object ends before the bytes that were asked for") from error
            explanation = self._explained(error, "GET", uri)
            if isinstance(explanation, AccessDenied) and self._is_absent(uri):
                raise ObjectMissing(f"GET {uri} at {self.endpoint}: there is no such object") from error
            raise explanation from error

    def _settled(self, error: Exception, uri: str, is_same: Callable[[], bool]) -> bool:
        """Whether a write that failed has happened after all: True, by this call; False, before it."""
        explanation = self._explained(error, "PUT", uri)
        if not isinstance(explanation, AccessDenied | StoreUnreachable | ObjectExists):
            raise explanation from error
        try:
            same = is_same()
        except AccessDenied:
            raise explanation from error
        except ObjectMissing:
            if isinstance(explanation, AccessDenied):
                raise explanation from error
            # A conflict with a writer that gave up, or an answer lost before the store had the object.
            raise StoreUnreachable(f"{explanation}; the object was not created: try again") from error
        if not same:
            raise ObjectExists(_other_bytes(uri)) from error
        return isinstance(explanation, StoreUnreachable)

    def _retention(self, bucket: str) -> dict[str, Any]:
        if bucket not in self._locked_buckets:
            self._locked_buckets[bucket] = self._has_object_lock(bucket)
        if not self._locked_buckets[bucket]:
            return {}
        return {"ObjectLockMode": "COMPLIANCE", "ObjectLockRetainUntilDate": datetime.now(UTC) + RETENTION}

    def _has_object_lock(self, bucket: str) -> bool:
        try:
            answer = self._client.get_object_lock_configuration(Bucket=bucket)
        except (ClientError, BotoCoreError) as error:
            if isinstance(error, ClientError) and code_of(error) != "NoSuchBucket":
                if status_of(error) in NO_OBJECT_LOCK_STATUS:
                    return False
                if status_of(error) == HTTPStatus.FORBIDDEN:
                    raise AccessDenied(
                        f"{self.identity} may not ask whether s3://{bucket} has Object Lock: "
                        "allow s3:GetBucketObjectLockConfiguration on the bucket"
                    ) from error
            raise self._explained(error, "Object Lock of", f"s3://{bucket}") from error
        return answer["ObjectLockConfiguration"].get("ObjectLockEnabled") == "Enabled"

    def _explained(self, error: Exception, action: str, uri: str) -> Exception:
        return explained(error, Request(action, uri, self.endpoint, self.identity))


def _config(endpoint: StoreEndpoint) -> Config:
    return Config(
        connect_timeout=CONNECT_TIMEOUT_SECONDS,
        read_timeout=READ_TIMEOUT_SECONDS,
        retries={"mode": "standard", "total_max_attempts": REQUEST_ATTEMPTS_MAX},
        max_pool_connections=4 * TRANSFERS_PARALLEL,
        signature_version="s3v4",
        # Names of buckets are hosts only at AWS; elsewhere that would need wildcard DNS.
        s3={"addressing_style": "path" if endpoint.endpoint else "auto"},
        # We send our own SHA-256; boto3's default sends trailers that many S3 servers do not understand.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )


def _other_bytes(uri: str) -> str:
    return f"{uri} exists already with other bytes, and is never overwritten; find out which writer made it"


def _checksum(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()

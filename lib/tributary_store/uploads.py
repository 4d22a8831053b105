"""Writing one object from front to back, while it is being made: by chunks, several on their way at a time.

A part of the multipart upload is a chunk of the object's digest, so each byte is hashed once for both.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

from botocore.exceptions import BotoCoreError, ClientError

from tributary_api.records import CHUNK_BYTES, FileDigest
from tributary_store.digests import digest_of_bytes
from tributary_store.errors import StoreError
from tributary_store.objects import Bytes, bucket_and_key

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import CompletedPartTypeDef

PARTS_PARALLEL = 2
"""Of one upload; each holds a chunk of 16 MiB."""
PARTS_MAX = 10_000
"""Of one multipart upload (S3 API)."""
S3_ERRORS = (ClientError, BotoCoreError)


@dataclass(frozen=True, slots=True)
class Hooks:
    """What an upload needs of its store."""

    put: Callable[[bytes], object]
    """Create the object from bytes that fit one chunk."""
    explain: Callable[[Exception], Exception]
    settle: Callable[[Exception, FileDigest], object]
    """Judge the failure to complete an upload of these bytes; returns if the object is there all the same."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part that the store has."""

    completed: CompletedPartTypeDef
    digest: str


class ChunkedUpload:
    """The `Upload` of an S3 store: one chunk is put, more go in parts. For one thread."""

    def __init__(self, client: S3Client, uri: str, hooks: Hooks) -> None:
        self._client, self._uri, self._hooks = client, uri, hooks
        self._bucket, self._key = bucket_and_key(uri)
        self._pool = ThreadPoolExecutor(PARTS_PARALLEL, thread_name_prefix="upload")
        self._chunk, self._filled, self._size = bytearray(), 0, 0
        self._upload_id = ""
        self._parts: list[Future[Part]] = []

    def write(self, data: Bytes) -> None:
        view = memoryview(data).cast("B")
        self._size += len(view)
        while len(view):
            # Not before there is more: a single chunk is put, and one needs no parts for it.
            if self._filled == CHUNK_BYTES:
                self._send_chunk()
            view = view[self._fill(view) :]

    def finish(self, name: str) -> FileDigest:
        if not self._parts:
            data = bytes(memoryview(self._chunk)[: self._filled])
            self._hooks.put(data)
            self._pool.shutdown()
            return digest_of_bytes(data, name)
        self._send_chunk()
        parts = [self._sent(part) for part in self._parts]
        file = FileDigest(path=name, size=self._size, chunks=[part.digest for part in parts])
        try:
            self._complete(parts)
        except S3_ERRORS as error:
            self.abort()
            self._hooks.settle(error, file)
        self._pool.shutdown()
        return file

    def abort(self) -> None:
        # Left-over parts cost space but are not an object; the bucket's lifecycle rule may remove them later.
        self._pool.shutdown(cancel_futures=True)
        if self._upload_id:
            abort(self._client, self._uri, self._upload_id)

    def _fill(self, view: memoryview) -> int:
        if not self._chunk:
            self._chunk = bytearray(CHUNK_BYTES)
        count = min(len(view), CHUNK_BYTES - self._filled)
        self._chunk[self._filled : self._filled + count] = view[:count]
        self._filled += count
        return count

    def _send_chunk(self) -> None:
        """Send what is there as the next part; waits while as many as may be are on their way."""
        if len(self._parts) == PARTS_MAX:
            raise StoreError(f"{self._uri}: larger than {PARTS_MAX * CHUNK_BYTES >> 30} GiB: split the file")
        if not self._upload_id:
            self._upload_id = self._begun()
        full, self._filled = bytes(memoryview(self._chunk)[: self._filled]), 0
        while len(open_ := [part for part in self._parts if not part.done()]) >= PARTS_PARALLEL:
            wait(open_, return_when=FIRST_COMPLETED)
        for part in self._parts[-2 * PARTS_PARALLEL :]:
            if part.done():
                self._sent(part)
        self._parts.append(self._pool.submit(self._send, len(self._parts) + 1, full))

    def _begun(self) -> str:
        try:
            answer = self._client.create_multipart_upload(
                Bucket=self._bucket, Key=self._key, ChecksumAlgorithm="SHA256"
            )
        except S3_ERRORS as error:
            raise self._hooks.explain(error) from error
        return answer["UploadId"]

    def _sent(self, part: Future[Part]) -> Part:
        try:
            return part.result()
        except S3_ERRORS as error:
            self.abort()
            raise self._hooks.explain(error) from error

    def _send(self, number: int, chunk: bytes) -> Part:
        digest = hashlib.sha256(chunk)
        checksum = base64.b64encode(digest.digest()).decode()
        answer = self._client.upload_part(
            Bucket=self._bucket,
            Key=self._key,
            UploadId=self._upload_id,
            PartNumber=number,
            Body=chunk,
            ChecksumSHA256=checksum,
        )
        completed: CompletedPartTypeDef = {
            "PartNumber": number,
            "ETag": answer["ETag"],
            "ChecksumSHA256": checksum,
        }
        return Part(completed, f"sha256:{digest.hexdigest()}")

    def _complete(self, parts: list[Part]) -> None:
        self._client.complete_multipart_upload(
            Bucket=self._bucket,
            Key=self._key,
            UploadId=self._upload_id,
            MultipartUpload={"Parts": [part.completed for part in parts]},
            IfNoneMatch="*",
        )


def abort(client: S3Client, uri: str, upload_id: str) -> None:
    bucket, key = bucket_and_key(uri)
    with contextlib.suppress(*S3_ERRORS):
        client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)


def discard_unfinished(client: S3Client, uri: str) -> int:
    """Abort the uploads to exactly this key that nobody finished. Raises the errors of boto3."""
    bucket, key = bucket_and_key(uri)
    answer = client.list_multipart_uploads(Bucket=bucket, Prefix=key)
    left = [upload["UploadId"] for upload in answer.get("Uploads", ()) if upload["Key"] == key]
    for upload_id in left:
        abort(client, uri, upload_id)
    return len(left)

"""The store's own speed: every byte that an aggregation reads and writes, hashed, and no arithmetic.

A child program: RAW_TRAFFIC holds its task as JSON, AWS_* the credentials. Parallel GETs of ranges, each
hashed with SHA-256, overlap with the parts of multipart PUTs, by the client library of the aggregator.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import boto3
from botocore.config import Config

TRAFFIC_ENV = "RAW_TRAFFIC"
PART_BYTES = 16 * 1024**2
OBJECT_BYTES_MAX = 1024**3
"""The result is written in objects of this size, as a sharded model is."""
THREADS = 4
"""As many as the aggregator has transfers at a time."""

Span = tuple[int, int]
"""Start and length, in bytes."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Objects of one size to read: base, then deltas. The base's bytes are what is written below `target`."""

    endpoint: str
    region: str
    bucket: str
    base: str
    deltas: list[str]
    size: int
    target: str

    def environment(self) -> dict[str, str]:
        return {TRAFFIC_ENV: json.dumps(asdict(self))}


class Copy:
    """The multipart uploads of the result."""

    def __init__(self, client: Any, traffic: Traffic) -> None:
        self._client = client
        names = [f"{traffic.target}{n}" for n in range(-(-traffic.size // OBJECT_BYTES_MAX))]
        self._uploads = [{"Bucket": traffic.bucket, "Key": name} for name in names]
        for upload in self._uploads:
            upload["UploadId"] = client.create_multipart_upload(**upload)["UploadId"]
        self._parts: list[list[dict[str, Any]]] = [[] for _ in names]

    def put(self, start: int, data: bytes) -> None:
        index, offset = divmod(start, OBJECT_BYTES_MAX)
        number = offset // PART_BYTES + 1
        answer = self._client.upload_part(**self._uploads[index], PartNumber=number, Body=data)
        self._parts[index].append({"PartNumber": number, "ETag": answer["ETag"]})

    def complete(self) -> None:
        for upload, parts in zip(self._uploads, self._parts, strict=True):
            ordered = sorted(parts, key=lambda part: part["PartNumber"])
            self._client.complete_multipart_upload(**upload, MultipartUpload={"Parts": ordered})


def main() -> None:
    traffic = Traffic(**json.loads(os.environ[TRAFFIC_ENV]))
    client = boto3.client(
        "s3",
        endpoint_url=traffic.endpoint,
        region_name=traffic.region,
        config=Config(
            s3={"addressing_style": "path"},
            max_pool_connections=THREADS,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )
    copy = Copy(client, traffic)
    with ThreadPoolExecutor(THREADS) as pool:
        # Consumed for its errors.
        for _ in pool.map(lambda job: job(), jobs(client, traffic, copy)):
            pass
    copy.complete()


def jobs(client: Any, traffic: Traffic, copy: Copy) -> Iterator[Callable[[], None]]:
    """In the order of an aggregation: the first part of every delta, of the base, the second, and so on."""
    for start in range(0, traffic.size, PART_BYTES):
        span = (start, min(PART_BYTES, traffic.size - start))
        for delta in traffic.deltas:
            yield partial(read_past, client, traffic.bucket, delta, span)
        yield partial(pass_on, client, traffic, copy, span)


def pass_on(client: Any, traffic: Traffic, copy: Copy, span: Span) -> None:
    copy.put(span[0], hashed(client, traffic.bucket, traffic.base, span))


def read_past(client: Any, bucket: str, key: str, span: Span) -> None:
    hashed(client, bucket, key, span)


def hashed(client: Any, bucket: str, key: str, span: Span) -> bytes:
    start, length = span
    answer = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{start + length - 1}")
    data: bytes = answer["Body"].read()
    hashlib.sha256(data).digest()
    return data


if __name__ == "__main__":
    main()

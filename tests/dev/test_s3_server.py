"""What the S3 server enforces: the facts that the docstring of `tributary_dev.s3` tells."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest
from botocore.exceptions import ClientError

from tributary_dev import cluster
from tributary_dev.s3 import S3Server

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

pytestmark = pytest.mark.cluster

PART_BYTES_MIN = 5 * 2**20


@pytest.fixture(scope="module")
def s3() -> S3Server:
    return cluster.up(nodes=0).s3


def a_user(s3: S3Server) -> tuple[str, "S3Client"]:
    name = f"user-{uuid4().hex[:8]}"
    s3.create_user(name, "its-secret")
    return name, s3.client(name, "its-secret")


def a_bucket(s3: S3Server, *, object_lock: bool = False) -> str:
    name = f"bucket-{uuid4().hex[:8]}"
    s3.create_bucket(name, object_lock=object_lock)
    return name


def allow(s3: S3Server, bucket: str, user: str, actions: list[str], resource: str, **more: Any) -> None:
    arn = f"arn:aws:s3:::{bucket}{resource}"
    row = {"Effect": "Allow", "Principal": {"AWS": [user]}, "Action": actions, "Resource": arn, **more}
    s3.put_policy(bucket, json.dumps({"Version": "2012-10-17", "Statement": [row]}))


def status_of(action: Callable[[], Any]) -> int:
    try:
        return int(action()["ResponseMetadata"]["HTTPStatusCode"])
    except ClientError as error:
        return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def put_in_parts(client: "S3Client", bucket: str, key: str, **more: Any) -> Any:
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    where: dict[str, Any] = {"Bucket": bucket, "Key": key, "UploadId": upload}
    tag = client.upload_part(**where, PartNumber=1, Body=b"z" * PART_BYTES_MIN)["ETag"]
    parts: Any = {"Parts": [{"PartNumber": 1, "ETag": tag}]}
    return client.complete_multipart_upload(**where, MultipartUpload=parts, **more)


def test_a_user_may_do_what_the_policy_says_and_nothing_else(s3: S3Server) -> None:
    bucket, (alice, client), (_, other) = a_bucket(s3), a_user(s3), a_user(s3)
    assert status_of(lambda: client.put_object(Bucket=bucket, Key="a/x", Body=b"1")) == 403
    allow(s3, bucket, alice, ["s3:PutObject", "s3:GetObject"], "/a/*")
    assert status_of(lambda: client.put_object(Bucket=bucket, Key="a/x", Body=b"1")) == 200
    assert status_of(lambda: client.put_object(Bucket=bucket, Key="b/x", Body=b"1")) == 403
    assert status_of(lambda: client.delete_object(Bucket=bucket, Key="a/x")) == 403
    assert status_of(lambda: client.get_object(Bucket=bucket, Key="a/none")) == 404
    assert status_of(lambda: other.get_object(Bucket=bucket, Key="a/x")) == 403


def test_listing_can_be_limited_to_a_prefix(s3: S3Server) -> None:
    bucket, (alice, client) = a_bucket(s3), a_user(s3)
    condition = {"StringLike": {"s3:prefix": "a/*"}}
    allow(s3, bucket, alice, ["s3:ListBucket"], "", Condition=condition)
    assert status_of(lambda: client.list_objects_v2(Bucket=bucket, Prefix="a/")) == 200
    assert status_of(lambda: client.list_objects_v2(Bucket=bucket)) == 403


def test_a_policy_cannot_demand_that_a_put_creates(s3: S3Server) -> None:
    bucket, (alice, _) = a_bucket(s3), a_user(s3)
    with pytest.raises(ClientError, match="invalid condition key"):
        allow(
            s3, bucket, alice, ["s3:PutObject"], "/*", Condition={"StringEquals": {"s3:if-none-match": "*"}}
        )


def test_creating_is_refused_when_the_object_exists(s3: S3Server) -> None:
    bucket, root = a_bucket(s3), s3.client()
    assert status_of(lambda: root.put_object(Bucket=bucket, Key="x", Body=b"1", IfNoneMatch="*")) == 200
    assert status_of(lambda: root.put_object(Bucket=bucket, Key="x", Body=b"2", IfNoneMatch="*")) == 412
    assert status_of(lambda: put_in_parts(root, bucket, "x", IfNoneMatch="*")) == 412
    assert status_of(lambda: put_in_parts(root, bucket, "y", IfNoneMatch="*")) == 200


def test_nobody_undoes_a_compliance_lock(s3: S3Server) -> None:
    bucket, (alice, client), root = a_bucket(s3, object_lock=True), a_user(s3), s3.client()
    allow(s3, bucket, alice, ["s3:*"], "/*")
    until = datetime.now(UTC) + timedelta(days=1)
    lock: dict[str, Any] = {"ObjectLockMode": "COMPLIANCE", "ObjectLockRetainUntilDate": until}
    assert status_of(lambda: client.put_object(Bucket=bucket, Key="x", Body=b"first", **lock)) == 200
    where: dict[str, Any] = {"Bucket": bucket, "Key": "x"}
    shorter: Any = {"Mode": "COMPLIANCE", "RetainUntilDate": until - timedelta(hours=1)}
    weaker: Any = {"Mode": "GOVERNANCE", "RetainUntilDate": until}
    attempts: list[Callable[[S3Client], Any]] = [
        lambda who: who.put_object(**where, Body=b"second"),
        lambda who: who.put_object(**where, Body=b"second", IfNoneMatch="*"),
        lambda who: put_in_parts(who, bucket, "x"),
        lambda who: who.delete_object(**where),
        lambda who: who.delete_object(**where, BypassGovernanceRetention=True),
        lambda who: who.put_object_retention(**where, Retention=shorter, BypassGovernanceRetention=True),
        lambda who: who.put_object_retention(**where, Retention=weaker, BypassGovernanceRetention=True),
    ]
    for who in (client, root):
        assert [status_of(partial(attempt, who)) for attempt in attempts] == [403] * len(attempts)
    assert root.get_object(**where)["Body"].read() == b"first"


def test_locking_needs_a_right_of_its_own(s3: S3Server) -> None:
    bucket, (alice, client) = a_bucket(s3, object_lock=True), a_user(s3)
    until = datetime.now(UTC) + timedelta(days=1)
    lock: dict[str, Any] = {"ObjectLockMode": "COMPLIANCE", "ObjectLockRetainUntilDate": until}
    allow(s3, bucket, alice, ["s3:PutObject"], "/*")
    assert status_of(lambda: client.put_object(Bucket=bucket, Key="x", Body=b"1", **lock)) == 403
    allow(s3, bucket, alice, ["s3:PutObject", "s3:PutObjectRetention"], "/*")
    assert status_of(lambda: client.put_object(Bucket=bucket, Key="x", Body=b"1", **lock)) == 200


def test_users_and_buckets_can_be_made_twice(s3: S3Server) -> None:
    bucket, (alice, _) = a_bucket(s3), a_user(s3)
    s3.create_bucket(bucket)
    allow(s3, bucket, alice, ["s3:PutObject"], "/*")
    s3.create_user(alice, "another-secret")
    renewed = s3.client(alice, "another-secret")
    assert status_of(lambda: renewed.put_object(Bucket=bucket, Key="x", Body=b"1")) == 200

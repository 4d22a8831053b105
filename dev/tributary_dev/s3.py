"""The cluster's S3 server (versitygw on a plain directory) with users and bucket policies of their own.

What versitygw 1.8 enforces, measured against a running server (tests/dev/test_s3_server.py asks again):

- A new user may do nothing. A bucket policy gives rights by `Principal: {"AWS": ["<access key>"]}`; there is
  no other policy. Without `s3:GetObject` a missing object is 403, with it 404.
- `If-None-Match: *` on PUT and on CompleteMultipartUpload: 412 when the object exists.
- Conditions: `s3:prefix`, `s3:delimiter`, `s3:max-keys` on ListBucket, `aws:SourceIp`, dates, user agent. A
  policy with a condition on `s3:if-none-match` is refused as malformed, so a policy cannot demand that a PUT
  creates: who may PUT a key may overwrite it, unless Object Lock protects what is there.
- Object Lock, on a bucket that was created with it, versioning being off: the headers
  `x-amz-object-lock-mode: COMPLIANCE` and `-retain-until-date` on PUT need `s3:PutObjectRetention` beside
  `s3:PutObject`. Until that date nobody, the administrator of the server included, can overwrite the object
  (PUT, copy, multipart), delete it, shorten the date or weaken the mode: 403, "protected by object lock".
  The administrator can lift GOVERNANCE, so it protects less. A bucket's default retention does the same
  for every object without headers of its own.
- On a locked object the answer to a PUT with `If-None-Match: *` is that 403, not 412.

So what must never be overwritten or deleted (ledger entries, manifests) lies in a bucket with Object Lock and
is put in COMPLIANCE mode. Only who can write to the server's disk, here root of this machine, can undo it.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from tributary_dev.places import ClusterPlaces
from tributary_dev.shell import CommandError, run

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

S3_PORT = 9000
S3_REGION = "us-east-1"
CREDENTIALS_FILE = "s3-root.json"


@dataclass(frozen=True)
class S3Server:
    """A running server and the key of its administrator, who alone makes users, buckets and policies."""

    endpoint_for_host: str
    endpoint_for_pods: str
    region: str
    access_key: str
    secret_key: str
    program: Path
    """The `versitygw` binary, whose `admin` command creates users."""

    def client(self, access_key: str | None = None, secret_key: str | None = None) -> S3Client:
        """A client on the host, as the administrator or as the user with the given key."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_for_host,
            region_name=self.region,
            aws_access_key_id=access_key or self.access_key,
            aws_secret_access_key=secret_key or self.secret_key,
            config=Config(s3={"addressing_style": "path"}, proxies={}),
        )

    def create_user(self, access_key: str, secret_key: str) -> None:
        """Create a user without any right, or give the one that exists this secret."""
        try:
            self._admin("create-user", "--access", access_key, "--secret", secret_key, "--role", "user")
        except CommandError as error:
            if "exist" not in str(error).lower():
                raise
            self._admin("update-user", "--access", access_key, "--secret", secret_key)

    def create_bucket(self, name: str, *, object_lock: bool = False) -> None:
        """Create a bucket of the administrator; one that exists is left as it is.

        `object_lock` must be decided here: S3 cannot add it to a bucket later.
        """
        try:
            self.client().create_bucket(Bucket=name, ObjectLockEnabledForBucket=object_lock)
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
                raise

    def put_policy(self, bucket: str, policy: str) -> None:
        """Replace the policy (JSON text) of a bucket."""
        self.client().put_bucket_policy(Bucket=bucket, Policy=policy)

    def _admin(self, *arguments: str) -> None:
        env = {
            "ADMIN_ACCESS_KEY": self.access_key,
            "ADMIN_SECRET_KEY": self.secret_key,
            "ADMIN_ENDPOINT_URL": self.endpoint_for_host,
            "ADMIN_REGION": self.region,
        }
        run([self.program, "admin", *arguments], env=env)


def root_credentials(place: ClusterPlaces) -> tuple[str, str]:
    """Access and secret key of the administrator; made at random when the cluster is."""
    path = place.root / CREDENTIALS_FILE
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(json.dumps(["root", secrets.token_hex(20)]))
    access_key, secret_key = json.loads(path.read_text())
    return access_key, secret_key

"""The cluster's S3 server (versitygw on a plain directory) with users and bucket policies of their own."""

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

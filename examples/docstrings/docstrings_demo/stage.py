"""Where the demo plays: a cluster with the two images, and an S3 server with an identity for each part."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from botocore.exceptions import BotoCoreError, ClientError

from docstrings_demo import manifests
from docstrings_demo.kube import Kube
from docstrings_demo.owners import BUCKET, OWNERS, Owner
from docstrings_demo.problems import DemoError
from tributary_api.meta import NamespacedName
from tributary_api.shared import StoreEndpoint
from tributary_dev import build, cluster
from tributary_dev.s3 import S3_REGION, S3Server
from tributary_store.keys import Layout
from tributary_store.objectstore import ObjectStore
from tributary_store.policies import ClientIdentity, HubIdentities, data_policy, exchange_policy

IMAGES = ("worker", "operator")
S3_VARIABLES = ("TRIBUTARY_S3_ENDPOINT", "TRIBUTARY_S3_ACCESS_KEY", "TRIBUTARY_S3_SECRET_KEY")
IMAGE_VARIABLES = {name: f"TRIBUTARY_{name.upper()}_IMAGE" for name in IMAGES}
HUB_PARTS = ("operator", "aggregator", "serving")
"""S3 identities of the hub; each owner has one of its own beside these."""


@dataclass(frozen=True)
class Stage:
    kube: Kube
    s3: S3Server
    images: Mapping[str, str]
    """Reference by digest of `worker` and `operator`."""

    @property
    def store_for_pods(self) -> StoreEndpoint:
        return StoreEndpoint(endpoint=self.s3.endpoint_for_pods, region=self.s3.region)

    def admin_store(self) -> ObjectStore:
        """The exchange store as the one who set it up; for the base model and the public documents."""
        endpoint = StoreEndpoint(endpoint=self.s3.endpoint_for_host, region=self.s3.region)
        return ObjectStore.open(endpoint, self.s3.access_key, self.s3.secret_key)


def embedded(identity: str | None = None) -> Stage:
    """The embedded cluster of this checkout, without the objects of earlier runs."""
    cluster.prepare(IMAGES)
    running = cluster.up(fresh=True, identity=identity)
    images = cluster.ensure_images(running, IMAGES)
    return Stage(Kube(running.kubeconfig, None, running.bin), running.s3, images)


def existing(context: str) -> Stage:
    """A cluster that the user has, with images and S3 server that the user names.

    Raises:
        DemoError: an environment variable is missing or wrong, or an earlier run has left its objects.
    """
    endpoint, access_key, secret_key = required(*S3_VARIABLES)
    images = dict(zip(IMAGES, required(*IMAGE_VARIABLES.values()), strict=True))
    gateway = build.binaries() / "versitygw"
    s3 = S3Server(endpoint, endpoint, S3_REGION, access_key, secret_key, gateway)
    stage = Stage(Kube(None, context, None), s3, images)
    refuse_leftovers(stage)
    return stage


def required(*names: str) -> list[str]:
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise DemoError(
            f"with --context the demo needs {', '.join(missing)} in the environment: "
            "see examples/docstrings/README.md"
        )
    return [os.environ[name] for name in names]


def refuse_leftovers(stage: Stage) -> None:
    """A finished round is adopted and not repeated, so a second run would show nothing."""
    try:
        buckets = {bucket["Name"] for bucket in stage.s3.client().list_buckets()["Buckets"]}
    except (BotoCoreError, ClientError) as error:
        raise DemoError(
            f"The S3 server does not let its administrator in: {error} Start it, or correct "
            f"{', '.join(S3_VARIABLES)}"
        ) from error
    if BUCKET in buckets and next(stage.admin_store().list(f"s3://{BUCKET}/rounds/"), None):
        raise DemoError(
            f"bucket {BUCKET} holds the rounds of an earlier run, which would be adopted and not repeated: "
            "start a new S3 server and remove the demo's namespaces, as examples/docstrings/README.md says"
        )


@dataclass(frozen=True)
class Identities:
    """(access key, secret key) of every S3 user of the demo."""

    hub: Mapping[str, tuple[str, str]]
    """By part of the hub."""
    owners: Mapping[str, tuple[str, str]]
    """By the owner's namespace."""


def create_identities(s3: S3Server) -> Identities:
    """Users with new secrets, and buckets whose policies let each of them do its part and nothing else."""
    hub = {part: new_user(s3, f"hub-{part}") for part in HUB_PARTS}
    owners = {owner.namespace: new_user(s3, owner.namespace) for owner in OWNERS}
    # Object Lock makes ledger entries and manifests impossible to change, for the administrator too.
    s3.create_bucket(BUCKET, object_lock=True)
    parts = HubIdentities(**{part: access_key for part, (access_key, _) in hub.items()})
    clients = [client_identity(owner, owners[owner.namespace][0]) for owner in OWNERS]
    s3.put_policy(BUCKET, exchange_policy(Layout(BUCKET), parts, clients))
    for owner in OWNERS:
        s3.create_bucket(owner.bucket)
        s3.put_policy(owner.bucket, data_policy(owner.bucket, owners[owner.namespace][0]))
    return Identities(hub, owners)


def new_user(s3: S3Server, access_key: str) -> tuple[str, str]:
    secret_key = secrets.token_hex(20)
    s3.create_user(access_key, secret_key)
    return access_key, secret_key


def client_identity(owner: Owner, access_key: str) -> ClientIdentity:
    declared = manifests.load_yaml(owner.values)["client"]
    client = NamespacedName(namespace=owner.namespace, name=declared["name"])
    return ClientIdentity(client, access_key, declared["spec"]["privacy"]["ledgerUri"])

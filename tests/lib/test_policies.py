"""What each identity may do in the buckets of a deployment, asked of a real S3 server."""

import json
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

import pytest
from botocore.exceptions import ClientError

from tributary_api.base import sha256_of
from tributary_api.meta import NamespacedName
from tributary_api.shared import StoreEndpoint
from tributary_store.errors import AccessDenied, ObjectMissing
from tributary_store.keys import Layout, ledger_entry
from tributary_store.objects import bucket_and_key
from tributary_store.objectstore import ObjectStore
from tributary_store.policies import (
    ClientIdentity,
    HubIdentities,
    data_policy,
    exchange_policy,
    ledger_policy,
)

pytestmark = pytest.mark.cluster

LAYOUT = Layout("exchange")
A, B = (NamespacedName(namespace=f"clinic-{x}", name="notes") for x in "ab")
AA = NamespacedName(namespace="clinic-a", name="notes-2")
"""Another client whose name continues A's: a prefix without its end would let A in."""


def ledger_of(client):
    return f"s3://exchange/ledger/{client.namespace}/{client.name}/"


CLIENTS = [ClientIdentity(c, f"id-{c.namespace}-{c.name}", ledger_of(c)) for c in (A, B, AA)]
HUB = HubIdentities("id-operator", "id-aggregator", "id-serving")
PARTS = {"a": CLIENTS[0].identity, "b": CLIENTS[1].identity, "operator": HUB.operator}
PARTS |= {"aggregator": HUB.aggregator, "serving": HUB.serving, "stranger": "id-stranger"}


def objects_of(run):
    """One object of every kind; another run gives other objects of the same kinds."""
    digest, n = sha256_of(run.encode()).removeprefix("sha256:"), sum(run.encode())
    return {
        "A's delta": LAYOUT.delta(A, run),
        "A's manifest": LAYOUT.delta_manifest(A, run),
        "A's ledger": ledger_entry(ledger_of(A), n),
        "B's delta": LAYOUT.delta(B, run),
        "B's manifest": LAYOUT.delta_manifest(B, run),
        "B's ledger": ledger_entry(ledger_of(B), n),
        "notes-2's delta": LAYOUT.delta(AA, run),
        "notes-2's ledger": ledger_entry(ledger_of(AA), n),
        "plan": LAYOUT.plan(run),
        "outcome": LAYOUT.outcome(run),
        "aggregate": LAYOUT.aggregate_manifest(run),
        "evaluation": LAYOUT.evaluation(run),
        "model weights": f"{LAYOUT.models}{digest}/model.safetensors",
        "model manifest": f"{LAYOUT.models}{digest}/bundle.json",
        "release weights": f"{LAYOUT.releases}{digest}/model.safetensors",
        "compression": LAYOUT.compression_manifest(run),
        "verdict": LAYOUT.gate_verdict(run),
        "dataset": f"{LAYOUT.datasets}{run}.jsonl",
        "A's data": f"s3://data-a/{run}/documents.jsonl",
    }


OBJECTS = objects_of("run")
MODELS = {"model weights", "model manifest"}
RELEASES = {"release weights", "compression"}
DELTAS = {"A's delta", "B's delta", "notes-2's delta"}
MANIFESTS = {"A's manifest", "B's manifest"}
LEDGERS = {"A's ledger", "B's ledger", "notes-2's ledger"}

READS = {
    "a": {"A's delta", "A's manifest", "A's ledger", "A's data"} | MODELS,
    "b": {"B's delta", "B's manifest", "B's ledger"} | MODELS,
    "operator": {"plan", "outcome", "aggregate", "evaluation", "model manifest", "compression", "verdict"}
    | MANIFESTS
    | LEDGERS,
    "aggregator": DELTAS | MANIFESTS | MODELS | {"dataset", "aggregate", "evaluation"},
    "serving": MODELS | RELEASES | {"dataset", "verdict"},
    "stranger": set(),
}
CREATES = {
    "a": {"A's delta", "A's manifest", "A's ledger", "A's data"},
    "b": {"B's delta", "B's manifest", "B's ledger"},
    "operator": {"plan", "outcome"} | LEDGERS,
    "aggregator": MODELS | {"aggregate", "evaluation"},
    "serving": RELEASES | {"verdict"},
    "stranger": set(),
}
RECORDS = LEDGERS | MANIFESTS | {"plan", "outcome", "aggregate", "model manifest"}
"""What must never change, so every writer of it retains it."""


@dataclass
class Deployment:
    server: object

    def store(self, part):
        """The store as one part of the deployment sees it."""
        endpoint = StoreEndpoint(endpoint=self.server.endpoint_for_host)
        if part == "admin":
            return ObjectStore.open(endpoint, self.server.access_key, self.server.secret_key)
        return ObjectStore.open(endpoint, PARTS[part], "secret-of-" + PARTS[part])


@pytest.fixture(scope="module")
def deployment(s3):
    for identity in {*PARTS.values(), CLIENTS[2].identity}:
        s3.create_user(identity, "secret-of-" + identity)
    s3.create_bucket("exchange", object_lock=True)
    s3.put_policy("exchange", exchange_policy(LAYOUT, HUB, CLIENTS))
    s3.create_bucket("data-a")
    s3.put_policy("data-a", data_policy("data-a", PARTS["a"]))
    world = Deployment(s3)
    admin = world.store("admin")
    for name, uri in OBJECTS.items():
        admin.put_new(uri, name.encode(), retain=name in RECORDS)
    return world


def allowed(act):
    try:
        act()
    except AccessDenied:
        return False
    return True


@pytest.mark.parametrize("part", PARTS)
def test_each_part_reads_its_own_and_nothing_else(deployment, part):
    store = deployment.store(part)
    assert {name for name, uri in OBJECTS.items() if allowed(lambda u=uri: store.get(u))} == READS[part]


@pytest.mark.parametrize("part", PARTS)
def test_each_part_creates_its_own_and_nothing_else(deployment, part):
    store = deployment.store(part)
    objects = objects_of(f"new-{part}")
    created = {name for name, uri in objects.items() if allowed(lambda u=uri: store.put_new(u, b"x"))}
    assert created == CREATES[part]


@pytest.mark.parametrize("part", [*PARTS, "admin"])
@pytest.mark.parametrize("name", sorted(RECORDS))
def test_nobody_overwrites_or_deletes_a_record(deployment, part, name):
    """Not with the API below our store either, which does not insist on If-None-Match."""
    bucket, key = bucket_and_key(OBJECTS[name])
    client = deployment.store(part)._client
    for act in (
        lambda: client.put_object(Bucket=bucket, Key=key, Body=b"forged"),
        lambda: client.delete_object(Bucket=bucket, Key=key),
        lambda: client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": key}]}),
        lambda: client.copy_object(
            Bucket=bucket, Key=key, CopySource=f"{bucket}/{key}", MetadataDirective="REPLACE"
        ),
        lambda: multipart(client, bucket, key),
        lambda: client.put_object_retention(
            Bucket=bucket,
            Key=key,
            Retention={"Mode": "GOVERNANCE", "RetainUntilDate": datetime(2030, 1, 1, tzinfo=UTC)},
        ),
    ):
        with suppress(ClientError):
            act()
    assert deployment.store("admin").get(OBJECTS[name]) == name.encode()


def multipart(client, bucket, key):
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    part = client.upload_part(Bucket=bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"forged")
    parts = {"Parts": [{"PartNumber": 1, "ETag": part["ETag"]}]}
    client.complete_multipart_upload(Bucket=bucket, Key=key, UploadId=upload, MultipartUpload=parts)


FOLDERS = {
    "": set(),
    "clients/": {"operator", "aggregator"},
    "clients/clinic-a/notes/": {"a", "operator", "aggregator"},
    "clients/clinic-b/notes/": {"b", "operator", "aggregator"},
    "ledger/": set(),
    "ledger/clinic-a/notes/": {"a", "operator"},
    "models/": {"a", "b", "operator", "aggregator", "serving"},
    "rounds/": {"operator", "aggregator"},
    "gates/": {"operator", "serving"},
}
"""Who may list what."""


@pytest.mark.parametrize("part", PARTS)
def test_each_part_lists_only_what_concerns_it(deployment, part):
    store = deployment.store(part)
    listed = {p for p in FOLDERS if allowed(lambda p=p: [*store.list(f"s3://exchange/{p}")])}
    assert listed == {p for p, parts in FOLDERS.items() if part in parts}


def test_what_is_missing_is_told_from_what_is_denied(deployment):
    a = deployment.store("a")
    assert a.head(LAYOUT.delta(A, "never")) is None
    with pytest.raises(AccessDenied):
        a.head(LAYOUT.delta(B, "never"))
    with pytest.raises(ObjectMissing):
        a.get(ledger_entry(ledger_of(A), 99))


def test_a_ledger_in_a_bucket_of_its_own(deployment):
    deployment.server.create_bucket("ledgers", object_lock=True)
    clients = [ClientIdentity(c.client, c.identity, f"s3://ledgers/{c.client}/") for c in CLIENTS]
    deployment.server.put_policy("ledgers", ledger_policy("ledgers", HUB.operator, clients))
    own, other = (ledger_entry(client.ledger_uri, 0) for client in clients[:2])
    assert deployment.store("a").put_new(own, b"a", retain=True)
    assert deployment.store("operator").get(own) == b"a"
    for part, uri in (("a", other), ("aggregator", own), ("serving", own)):
        assert not allowed(lambda p=part, u=uri: deployment.store(p).put_new(u, b"x", retain=True))
        assert not allowed(lambda p=part, u=uri: deployment.store(p).get(u))


def test_an_owner_changes_its_data_and_nobody_else_does(deployment):
    a, b = (deployment.store(part)._client for part in "ab")
    a.put_object(Bucket="data-a", Key="d", Body=b"1")
    a.put_object(Bucket="data-a", Key="d", Body=b"2")
    for act in (
        lambda: b.delete_object(Bucket="data-a", Key="d"),
        lambda: b.put_object(Bucket="data-a", Key="d"),
    ):
        with pytest.raises(ClientError, match="AccessDenied"):
            act()
    a.delete_object(Bucket="data-a", Key="d")


def test_where_the_store_can_the_policy_demands_creation():
    policy = json.loads(exchange_policy(LAYOUT, HUB, CLIENTS, demands_creation=True))
    (rule,) = [s for s in policy["Statement"] if s["Sid"] == "NobodyOverwrites"]
    assert (rule["Effect"], rule["Action"]) == ("Deny", ["s3:PutObject"])
    assert rule["Condition"]["Null"] == {"s3:if-none-match": "true"}

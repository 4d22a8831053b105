"""Who may do what in which bucket, as S3 bucket policies: least privilege, and nobody deletes.

An identity is whatever the store knows as a principal: an access key for versitygw, an ARN for AWS.

What protects create-only objects, the strongest first:

- Object Lock on the bucket: `put_new(retain=True)` then makes ledger entries and manifests impossible to
  overwrite or delete, for the store's administrator too. Works on versitygw without versioning. A store with
  versioning (AWS) keeps the object but lets a later write hide it, so there the policy must demand it:
- `demands_creation` refuses any write without If-None-Match (condition key `s3:if-none-match`: Amazon S3 User
  Guide, "Enforce conditional writes on Amazon S3 buckets"). versitygw takes such a policy for malformed.
- With neither, a client could overwrite its own delta, manifest and ledger, and nothing else.

A `*` in a resource crosses `/`; so whatever is to be scoped comes first in the key (see `keys`), and a suffix
can be scoped as well: the operator reads `clients/*/manifest.json` and not the deltas beside them.

A policy holds at most 20 KiB on AWS, some twenty clients; a larger cohort needs policies on the identities.
versitygw keeps it with the bucket's directory: at most 4 KiB on ext4, unless it runs with --sidecar.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tributary_api.base import canonical_json
from tributary_api.meta import NamespacedName
from tributary_store.bundle_files import BUNDLE_FILE, CONFIG_FILE
from tributary_store.keys import MANIFEST, Layout
from tributary_store.objects import bucket_and_key

Statement = dict[str, Any]

READ = ("s3:GetObject",)
CREATE = ("s3:PutObject", "s3:PutObjectRetention", "s3:AbortMultipartUpload")
SEE_UNFINISHED = ("s3:ListBucketMultipartUploads",)
FORBIDDEN_TO_ALL = ("s3:DeleteObject", "s3:DeleteObjectVersion", "s3:BypassGovernanceRetention")
ASK_FOR_OBJECT_LOCK = ("s3:GetBucketObjectLockConfiguration",)


@dataclass(frozen=True, slots=True)
class ClientIdentity:
    """A client of the exchange, and where its ledger lies (in this bucket or another)."""

    client: NamespacedName
    identity: str
    ledger_uri: str


@dataclass(frozen=True, slots=True)
class HubIdentities:
    """The hub's parts: the operator; aggregate and evaluate; compress, gate and serve."""

    operator: str
    aggregator: str
    serving: str


@dataclass(frozen=True, slots=True)
class Right:
    """What one identity may do with the keys of one bucket; patterns may hold `*`."""

    name: str
    identity: str
    reads: tuple[str, ...] = ()
    creates: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()
    tidies: bool = False
    """May see unfinished uploads, in order to remove what a killed writer left."""


def exchange_policy(
    layout: Layout, hub: HubIdentities, clients: Sequence[ClientIdentity], *, demands_creation: bool = False
) -> str:
    """The policy, as JSON, of the bucket that deltas, models, rounds and perhaps ledgers go through."""
    rights = [*_hub_rights(layout, hub), *_client_rights(layout, clients)]
    return _document(
        layout.bucket, [*rights, *_ledger_rights(layout.bucket, hub.operator, clients)], demands_creation
    )


def ledger_policy(
    bucket: str, operator: str, clients: Sequence[ClientIdentity], *, demands_creation: bool = False
) -> str:
    """The policy, as JSON, of a bucket for ledgers alone: those of `clients` whose ledger lies there."""
    return _document(bucket, _ledger_rights(bucket, operator, clients), demands_creation)


def data_policy(bucket: str, owner: str) -> str:
    """The policy, as JSON, of a data owner's bucket: the owner's identity and nobody else.

    The owner may change and remove its data, so no ledger belongs there.
    """
    right = Right("Owner", owner, reads=("*",), creates=("*",), lists=("*",))
    remove = _statement("OwnerRemove", "Allow", [owner], ("s3:DeleteObject",), [f"{bucket}/*"])
    return _json([*_statements(bucket, right), remove])


def _hub_rights(layout: Layout, hub: HubIdentities) -> Iterator[Right]:
    models, releases = _key(layout.models), _key(layout.releases)
    datasets, deltas = _key(layout.datasets), _key(layout.clients)
    any_run = "*"
    plan, outcome = _key(layout.plan(any_run)), _key(layout.outcome(any_run))
    aggregate, evaluation = _key(layout.aggregate_manifest(any_run)), _key(layout.evaluation(any_run))
    records = layout.aggregate_records(any_run)
    aggregation, progress = _key(records.folder) + "*", _key(records.progress) + "*"
    compression, verdict = _key(layout.compression_manifest("*")), _key(layout.gate_verdict("*"))
    # From a model's shape the operator tells how much noise a round adds; it never reads weights.
    bundle = (f"{models}*/{BUNDLE_FILE}", f"{models}*/{CONFIG_FILE}", f"{releases}*/{BUNDLE_FILE}")
    yield Right(
        "HubOperator",
        hub.operator,
        reads=(
            plan,
            outcome,
            aggregate,
            progress,
            evaluation,
            compression,
            verdict,
            *bundle,
            f"{deltas}*/{MANIFEST}",
        ),
        creates=(plan, outcome),
        lists=("rounds/*", f"{deltas}*", f"{models}*", f"{releases}*", "gates/*"),
    )
    yield Right(
        "Aggregator",
        hub.aggregator,
        reads=(f"{deltas}*", f"{models}*", f"{datasets}*", aggregation, evaluation),
        creates=(f"{models}*", aggregation, evaluation),
        lists=(f"{deltas}*", f"{models}*", f"{datasets}*", "rounds/*"),
        tidies=True,
    )
    yield Right(
        "Serving",
        hub.serving,
        reads=(f"{models}*", f"{releases}*", f"{datasets}*", verdict),
        creates=(f"{releases}*", verdict),
        lists=(f"{models}*", f"{releases}*", f"{datasets}*", "gates/*"),
    )


def _client_rights(layout: Layout, clients: Iterable[ClientIdentity]) -> Iterator[Right]:
    for n, client in enumerate(clients):
        own = _key(layout.client(client.client)) + "*"
        models = _key(layout.models) + "*"
        yield Right(f"Client{n}", client.identity, reads=(own, models), creates=(own,), lists=(own, models))


def _ledger_rights(bucket: str, operator: str, clients: Iterable[ClientIdentity]) -> Iterator[Right]:
    ledgers = []
    for n, client in enumerate(clients):
        ledger_bucket, prefix = bucket_and_key(client.ledger_uri)
        if ledger_bucket == bucket:
            ledgers.append(prefix.rstrip("/") + "/*")
            yield _same_keys(f"Ledger{n}", client.identity, ledgers[-1:])
    if ledgers:
        yield _same_keys("Ledgers", operator, ledgers)


def _same_keys(name: str, identity: str, keys: Sequence[str]) -> Right:
    return Right(name, identity, tuple(keys), tuple(keys), tuple(keys))


def _document(bucket: str, rights: Iterable[Right], demands_creation: bool) -> str:
    rights = list(rights)
    statements = [statement for right in rights for statement in _statements(bucket, right)]
    everybody = sorted({right.identity for right in rights})
    statements.append(_statement("AskForLock", "Allow", everybody, ASK_FOR_OBJECT_LOCK, [bucket]))
    statements.append(_deny("NobodyDeletes", bucket, FORBIDDEN_TO_ALL))
    if demands_creation:
        # Parts of a multipart upload carry no If-None-Match, only its completion does: both must hold.
        condition = {"Null": {"s3:if-none-match": "true"}, "Bool": {"s3:ObjectCreationOperation": "true"}}
        statements.append(_deny("NobodyOverwrites", bucket, ("s3:PutObject",)) | {"Condition": condition})
    return _json(statements)


def _json(statements: Iterable[Statement]) -> str:
    # Without spaces: stores limit a policy's size.
    return canonical_json({"Version": "2012-10-17", "Statement": list(statements)}).decode()


def _statements(bucket: str, right: Right) -> Iterator[Statement]:
    who = [right.identity]
    reads, creates = ([f"{bucket}/{key}" for key in keys] for keys in (right.reads, right.creates))
    yield _statement(right.name + "Read", "Allow", who, READ, reads)
    yield _statement(right.name + "Create", "Allow", who, CREATE, creates)
    condition = {"StringLike": {"s3:prefix": list(right.lists)}}
    listing = _statement(right.name + "List", "Allow", who, ("s3:ListBucket",), [bucket])
    yield listing | {"Condition": condition}
    if right.tidies:
        yield _statement(right.name + "Tidy", "Allow", who, SEE_UNFINISHED, [bucket])


def _deny(name: str, bucket: str, actions: Sequence[str]) -> Statement:
    return _statement(name, "Deny", ["*"], actions, [f"{bucket}/*"])


def _statement(
    name: str, effect: str, principals: list[str], actions: Sequence[str], resources: Iterable[str]
) -> Statement:
    return {
        "Sid": name,
        "Effect": effect,
        "Principal": {"AWS": principals},
        "Action": list(actions),
        "Resource": [f"arn:aws:s3:::{resource}" for resource in resources],
    }


def _key(uri: str) -> str:
    return bucket_and_key(uri)[1]

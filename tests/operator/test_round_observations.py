"""What a round makes of a world in which one client is out of order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from kubernetes.aio.client import V1Job, V1ObjectMeta
from memory_store import MemoryStore
from round_worlds import BASE, SETTINGS, T0, a_client, a_delta, a_job, a_plan, a_round, decided, nn
from signers import HUB_KEY, OWNER_KEY

from tributary_accounting.ledger import Chain, LedgerBroken
from tributary_accounting.signatures import SigningKey
from tributary_api.client import FederatedClient
from tributary_api.records import BundleManifest, LedgerEntry, LedgerKind, ProgressMark, RoundPlan
from tributary_api.round import Method
from tributary_operator import names
from tributary_operator.accounting import Account, LedgerRef
from tributary_operator.api import Forbidden
from tributary_operator.clients.reconciler import ClientReconciler
from tributary_operator.jobs import Denied, JobState, ObservedJob
from tributary_operator.kinds import Kind
from tributary_operator.reconciler import World
from tributary_operator.rounds.eligibility import name_of
from tributary_operator.rounds.models import trained_weights
from tributary_operator.rounds.observe import Memory, observe
from tributary_operator.rounds.reconciler import _Effects
from tributary_operator.rounds.training import ACCESS_LOST_AFTER
from tributary_operator.store import Records
from tributary_store import bundle
from tributary_store.bundle import BUNDLE_FILE, bundle_digest, file_uri
from tributary_store.errors import AccessDenied, ObjectMissing
from tributary_store.objects import ObjectInfo
from tributary_store.tensors import encode_header

FEDROUND = a_round(clients={"minAvailable": 1})
PLAN = a_plan(FEDROUND, [a_client("a"), a_client("b")])
LAYOUT = SETTINGS.layout


@dataclass
class Objects:
    """An object store of these objects; an exception is raised in place of its object."""

    held: dict[str, bytes | Exception] = field(default_factory=dict)

    def get(self, uri: str) -> bytes:
        found = self.held.get(uri, ObjectMissing(uri))
        if isinstance(found, Exception):
            raise found
        return found

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter([ObjectInfo(uri, 1) for uri in sorted(self.held) if uri.startswith(prefix)])


@dataclass
class Watches:
    """No Jobs at all, unless a test has some."""

    denied: dict[str, Denied] = field(default_factory=dict)
    found: list[ObservedJob] = field(default_factory=list)

    async def retain(self, *_: Any) -> dict[str, Denied]:
        return self.denied

    def jobs(self, *_: Any) -> list[Any]:
        return self.found


@dataclass
class Cluster:
    """FederatedClients as the API server keeps them."""

    clients: list[Any] = field(default_factory=list)

    async def find(self, *_: Any) -> tuple[list[Any], str]:
        return self.clients, "1"

    async def namespace_labels(self, _: str) -> dict[str, str]:
        return {}

    async def patch_status(self, raw: Any, _: Kind, status: Any) -> Any:
        return {**raw, "status": status}

    async def emit(self, *_: Any) -> None:
        """Events are no matter here."""


def launched(client: str, receipt_key: str | None = OWNER_KEY.public) -> Chain:
    """The ledger of a client whose worker has started; without a key: has not."""
    grant = next(planned.grant for planned in PLAN.cohort if planned.client == nn(client))
    entry = LedgerEntry(
        n=0,
        kind=LedgerKind.LAUNCH if receipt_key else LedgerKind.RESERVE,
        data_set=nn(client),
        client=nn(client),
        run_key=grant.run_key,
        grant_digest=grant.digest,
        hub_namespace="hub",
        mechanism=grant.mechanism,
        delta=grant.delta,
        recorded_at=T0,
        receipt_key=receipt_key,
    )
    return Chain((entry,))


@dataclass
class Accounting:
    """Ledgers of workers that have launched, and noise that is already solved for."""

    ledgers: dict[str, Chain | Exception] = field(default_factory=dict)

    async def chain(self, ref: LedgerRef) -> Chain:
        found = self.ledgers.get(ref.data_set.namespace) or launched(ref.data_set.namespace)
        if isinstance(found, Exception):
            raise found
        return found

    async def runs_within(self, client: FederatedClient, *_: Any, besides: str, at_most: int) -> int:
        """`a` affords 3 rounds, `b` 7, and a broken ledger tells nothing."""
        await self.chain(LedgerRef.of(client))
        return min(at_most, {"a": 3, "b": 7}[client.metadata.namespace])

    async def account(self, _: Any) -> Account:
        return Account(Chain(), 0.0, 0.0)

    def sigma_if_solved(self, *_: Any) -> float:
        return 0.8


def raw_client(name: str) -> Any:
    return json.loads(a_client(name).model_dump_json(by_alias=True, exclude_none=True))


def a_world(
    clients: list[Any],
    held: dict[str, bytes | Exception],
    ledgers: dict[str, Chain | Exception] | None = None,
) -> World:
    def cached(_: Kind, namespace: str, name: str) -> Any:
        return next((raw for raw in clients if raw["metadata"]["namespace"] == namespace), None)

    return World(
        settings=SETTINGS,
        cluster=Cluster(clients),  # type: ignore[arg-type]
        jobs=Watches(),  # type: ignore[arg-type]
        records=Records(Objects(held), 1),  # type: ignore[arg-type]
        accounting=Accounting(ledgers or {}),  # type: ignore[arg-type]
        clock=lambda: T0,
        wake=lambda _: None,
        cached=cached,
    )


async def observed(
    clients: list[Any],
    held: dict[str, bytes | Exception],
    ledgers: dict[str, Chain | Exception] | None = None,
) -> Any:
    return await observe(a_world(clients, held, ledgers), FEDROUND, "round", Memory())


def a_planned_store(plan: RoundPlan = PLAN) -> dict[str, bytes | Exception]:
    return {
        LAYOUT.plan(plan.run_key): plan.canonical_json(),
        LAYOUT.delta_manifest(nn("b"), plan.run_key): a_delta(plan, "b").canonical_json(),
    }


async def test_of_each_pod_that_aggregates_the_newest_mark_counts() -> None:
    records = LAYOUT.aggregate_records(PLAN.run_key)
    marks = {
        records.progress_mark(pod, percent): mark(percent).canonical_json()
        for pod, percent in ((0, 10), (0, 90), (0, 100), (1, 20))
    }
    running = a_job("hub", names.AGGREGATE, JobState.RUNNING)
    held = {**a_planned_store(), **marks}
    world = replace(a_world([raw_client("a"), raw_client("b")], held), jobs=Watches(found=[running]))
    seen = await observe(world, FEDROUND, "round", Memory())
    assert [found.bytes_done for found in seen.progress] == [100, 20]
    assert (await observed([raw_client("a"), raw_client("b")], held)).progress == (), "nothing runs"


def mark(percent: int) -> ProgressMark:
    return ProgressMark(bytes_done=percent, bytes_total=100, bytes_per_second=1)


OTHER_FILE = a_delta(PLAN, "a").file.model_copy(update={"size": 2})


@pytest.mark.parametrize(
    ("manifest", "reason"),
    [
        (b"no JSON", "DeltaUnreadable"),
        (b"{}", "DeltaUnreadable"),
        (AccessDenied("no"), "DeltaDenied"),
        (a_delta(PLAN, "b").canonical_json(), "ReceiptMismatch"),
        (a_delta(PLAN, "a").model_copy(update={"signature": None}).canonical_json(), "ReceiptMismatch"),
        (HUB_KEY.signed(a_delta(PLAN, "a")).canonical_json(), "ReceiptMismatch"),
        (a_delta(PLAN, "a").model_copy(update={"file": OTHER_FILE}).canonical_json(), "ReceiptMismatch"),
    ],
)
async def test_a_delta_that_cannot_be_used_costs_the_round_its_client_alone(
    manifest: bytes | Exception, reason: str
) -> None:
    store = {**a_planned_store(), LAYOUT.delta_manifest(nn("a"), PLAN.run_key): manifest}
    seen = await observed([raw_client("a"), raw_client("b")], store)
    assert {client: problem.reason for client, problem in seen.refused.items()} == {nn("a"): reason}
    assert seen.deltas.keys() == {nn("b")}
    assert decided(FEDROUND, seen).status.conditions, "the round goes on"


@pytest.mark.parametrize(
    ("ledger", "reason"),
    [
        (launched("a", None), "ReceiptMismatch"),
        (launched("a", HUB_KEY.public), "ReceiptMismatch"),
        (LedgerBroken("altered"), "LedgerBroken"),
    ],
)
async def test_a_delta_counts_only_with_the_key_that_its_worker_named_in_the_owners_ledger(
    ledger: Chain | Exception, reason: str
) -> None:
    store = {**a_planned_store(), LAYOUT.delta_manifest(nn("a"), PLAN.run_key): DELTA_OF_A}
    seen = await observed([raw_client("a"), raw_client("b")], store, {"a": ledger})
    assert {client: problem.reason for client, problem in seen.refused.items()} == {nn("a"): reason}
    assert seen.deltas.keys() == {nn("b")}


DELTA_OF_A = a_delta(PLAN, "a").canonical_json()


@pytest.mark.parametrize(("own", "taken"), [(OWNER_KEY, True), (HUB_KEY, False)])
async def test_an_owner_may_say_which_key_signs(own: SigningKey, taken: bool) -> None:
    store = {LAYOUT.plan(PLAN.run_key): PLAN.canonical_json()}
    store[LAYOUT.delta_manifest(nn("a"), PLAN.run_key)] = DELTA_OF_A
    raw = raw_client("a")
    raw["spec"]["privacy"]["receiptKey"] = own.public
    seen = await observed([raw, raw_client("b")], store)
    assert (nn("a") in seen.deltas) is taken


@pytest.mark.parametrize(
    ("ledgers", "rounds"),
    [({}, 3), ({"a": LedgerBroken("altered")}, 7), ({n: LedgerBroken("altered") for n in "ab"}, None)],
)
async def test_the_tightest_budget_says_how_many_such_rounds_there_are(
    ledgers: dict[str, Chain | Exception], rounds: int | None
) -> None:
    store: dict[str, bytes | Exception] = {LAYOUT.plan(PLAN.run_key): PLAN.canonical_json()}
    seen = await observed([raw_client("b"), raw_client("a")], store, ledgers)
    assert (seen.affordable_rounds, seen.is_announced) == (rounds, False)


async def test_what_the_status_shows_is_announced_and_not_asked_again() -> None:
    store: dict[str, bytes | Exception] = {LAYOUT.plan(PLAN.run_key): PLAN.canonical_json()}
    clients = [raw_client("a"), raw_client("b")]
    first = decided(FEDROUND, await observed(clients, store)).status
    shown = FEDROUND.model_copy(update={"status": first})
    seen = await observe(a_world(clients, store), shown, "round", Memory())
    assert (seen.affordable_rounds, seen.is_announced) == (None, True)
    assert decided(shown, seen).status.privacy.affordable_rounds == 3
    assert {record.planned.client for record in decided(shown, seen).record} == {nn("a"), nn("b")}


def broken(name: str) -> Any:
    """As an older version of the API let it in."""
    raw = raw_client(name)
    return {**raw, "spec": {**raw["spec"], "privacy": {}}}


async def test_a_client_that_is_not_valid_is_skipped_when_a_round_is_planned() -> None:
    digest = bundle_digest([])
    fedround = a_round(baseModel={"uri": BASE.uri, "digest": digest})
    bundle = BundleManifest(digest=digest, files=[])
    world = a_world([broken("a"), raw_client("b")], {file_uri(BASE, BUNDLE_FILE): bundle.canonical_json()})
    seen = await observe(world, fedround, "round", Memory())
    assert seen.selection is not None
    assert [name_of(candidate.client) for candidate in seen.selection.candidates] == [nn("b")]


async def test_a_member_that_is_not_valid_any_more_costs_the_round_that_member_alone() -> None:
    seen = await observed([broken("a"), raw_client("b")], a_planned_store())
    assert {client: problem.reason for client, problem in seen.refused.items()} == {nn("a"): "ClientInvalid"}
    assert seen.clients.keys() == {nn("b")}


async def test_a_neighbour_that_is_not_valid_does_not_hide_what_is_said_about_a_client() -> None:
    clients = [broken("a"), raw_client("a")]
    clients[0]["metadata"]["name"] = "neighbour"
    reconciler = ClientReconciler(a_world(clients, {}), lambda: clients)
    written = await reconciler.run_pass(clients[1])
    assert [c["reason"] for c in written.raw["status"]["conditions"] if c["type"] == "Ready"] == [
        "Consenting"
    ]


async def test_a_job_that_is_forbidden_costs_the_round_its_client_only_when_that_lasts() -> None:
    now, memory = T0, Memory()
    world = replace(a_world([], {}), clock=lambda: now)
    labels = {names.CLIENT: "a"}
    job = V1Job(metadata=V1ObjectMeta(name="j", namespace="a", labels=labels))
    assert _Effects(world, memory).refused(job, Forbidden("no"))
    now += ACCESS_LOST_AFTER / 2
    assert _Effects(world, memory).refused(job, Forbidden("no"))
    assert not memory.refused
    now += ACCESS_LOST_AFTER / 2
    assert _Effects(world, memory).refused(job, Forbidden("no"))
    assert memory.refused[nn("a")].reason == "NoAccess"


async def test_full_training_counts_every_stored_weight(tmp_path: Path) -> None:
    store = MemoryStore()
    (tmp_path / "config.json").write_text("{}")
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "a": ("F32", (5, 3)),
        "b": ("BF16", (7,)),
        "s": ("F32", ()),
    }
    data = encode_header(shapes, {}) + bytes(4 * 15 + 2 * 7 + 4)
    (tmp_path / "model.safetensors").write_bytes(data)
    ref = bundle.push(store, tmp_path, LAYOUT.models)
    world = replace(a_world([], {}), records=Records(store, 1))  # type: ignore[arg-type]
    assert await trained_weights(world, Method.model_validate({"full": {}}), ref) == 15 + 7 + 1
    gone = ref.model_copy(update={"uri": ref.uri + "x"})
    assert await trained_weights(world, Method.model_validate({"full": {}}), gone) is None

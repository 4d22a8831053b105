"""Rounds under the real operator, API server, Job controller, S3, ledger and accountant; pods are doubled."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from installation import BUCKET, HUB, client_values, rendered
from kube import Kubectl, Object, eventually
from operator_process import OperatorProcess, operator_kubeconfig
from pausing_proxy import PausingProxy
from worker_double import CRASH, HANG, OUT_OF_MEMORY, WorkerDouble, failing, tiny_bundle

from tributary_accounting.ledger import Chain, read
from tributary_api.base import API_VERSION
from tributary_api.failures import Reason
from tributary_api.meta import NamespacedName
from tributary_api.records import LedgerKind
from tributary_api.shared import ModelRef, StoreEndpoint
from tributary_dev import cluster as dev
from tributary_operator import names
from tributary_store.objectstore import ObjectStore

pytestmark = pytest.mark.cluster

WAIT_SECONDS = 90
"""The first round waits for a calibration, which is slow on a busy machine."""
DIGEST = "sha256:" + "0" * 64


@pytest.fixture(scope="module")
def suite() -> str:
    """Label of this run's clients, so that rounds of another run select none of them."""
    return f"run-{secrets.token_hex(4)}"


@pytest.fixture(scope="module")
def store(running: dev.Cluster, installed: Kubectl) -> ObjectStore:
    s3 = running.s3
    endpoint = StoreEndpoint(endpoint=s3.endpoint_for_host, region=s3.region)
    return ObjectStore.open(endpoint, s3.access_key, s3.secret_key)


@pytest.fixture(scope="module")
def base_model(store: ObjectStore, suite: str) -> ModelRef:
    return tiny_bundle(store, f"s3://{BUCKET}/models/", seed=suite)


@pytest.fixture(scope="module")
def tenants(installed: Kubectl, helm: Path, suite: str) -> Iterator[list[str]]:
    """Three data owners with the tenant's chart, each in a namespace of its own."""
    found = [f"{suite}-{letter}" for letter in "abc"]
    for namespace in found:
        installed.namespace(namespace)
        install_client(installed, helm, namespace, suite)
    yield found
    installed("delete", "namespace", "--wait=false", *found)


def install_client(installed: Kubectl, helm: Path, namespace: str, suite: str, **spec: Any) -> None:
    values = client_values("notes")
    base = values["client"]["spec"]
    base["data"] = {"name": "notes", "uri": f"s3://{namespace}/notes/", "numExamples": 1000}
    base["privacy"]["ledgerUri"] = f"s3://{BUCKET}/ledger/{namespace}/notes/"
    base["worker"]["nodes"] = 1
    values["client"]["spec"] = {**base, **spec}
    values["client"]["labels"] = {"suite": suite}
    installed.apply(*rendered(helm, "tributary-client", namespace, values))


@pytest.fixture(scope="module")
def road_to_store(running: dev.Cluster) -> Iterator[PausingProxy]:
    """What lies between the operator and S3."""
    proxy = PausingProxy(running.s3.endpoint_for_host)
    yield proxy
    proxy.close()


@pytest.fixture(scope="module")
def operating(
    installed: Kubectl,
    running: dev.Cluster,
    road_to_store: PausingProxy,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[OperatorProcess]:
    place = tmp_path_factory.mktemp("operator")
    s3 = running.s3
    config = operator_kubeconfig(installed, place / "kubeconfig")
    process = OperatorProcess(config, place / "log", road_to_store.endpoint, s3.access_key, s3.secret_key)
    process.start()
    yield process
    print(process.log.read_text()[-20000:])
    assert process.stop() == 0


@pytest.fixture
def workers(installed: Kubectl, store: ObjectStore, tenants: list[str]) -> Iterator[WorkerDouble]:
    with WorkerDouble(installed, store, [*tenants, HUB]) as double:
        yield double


class Rounds:
    """Creates rounds, and waits for what becomes of them."""

    def __init__(self, kubectl: Kubectl, suite: str, base_model: ModelRef) -> None:
        self.kubectl, self.suite, self.base_model = kubectl, suite, base_model
        self.created: list[str] = []

    def manifest(self, name: str, **spec: Any) -> Object:
        base = {
            "baseModel": {"uri": self.base_model.uri, "digest": self.base_model.digest},
            "clients": {"selector": {"matchLabels": {"suite": self.suite}}},
            "method": {"lora": {}},
            "training": {"maxSteps": 2, "expectedBatchSize": 64, "learningRate": "1e-3"},
            "privacy": {"epsilon": "1", "delta": "1e-6"},
        }
        metadata = {"name": f"{self.suite}-{name}", "namespace": HUB}
        return {
            "apiVersion": API_VERSION,
            "kind": "FederatedRound",
            "metadata": metadata,
            "spec": {**base, **spec},
        }

    def apply(self, manifest: Object) -> str:
        self.kubectl.apply(manifest)
        name: str = manifest["metadata"]["name"]
        self.created.append(name)
        return name

    def status(self, name: str) -> Object:
        found: Object = self.kubectl.get("fround", name, "-n", HUB).get("status", {})
        return found

    def ready(self, name: str) -> tuple[str, str]:
        """Status and reason of Ready."""
        for condition in self.status(name).get("conditions", []):
            if condition["type"] == "Ready":
                return condition["status"], condition["reason"]
        return "", ""

    def becomes(self, name: str, reason: str) -> None:
        last: list[Any] = []

        def check() -> bool:
            last[:] = [self.ready(name)]
            return last[0][1] == reason

        try:
            eventually(check, timeout_seconds=WAIT_SECONDS)
        except AssertionError as error:
            raise AssertionError(f"{name} is {last[0]}, not {reason}: {self.status(name)}") from error

    def delete(self, name: str) -> None:
        self.kubectl("delete", "fround", name, "-n", HUB, "--timeout=60s")


@pytest.fixture
def rounds(
    installed: Kubectl, operating: OperatorProcess, suite: str, base_model: ModelRef
) -> Iterator[Rounds]:
    made = Rounds(installed, suite, base_model)
    yield made
    for name in made.created:
        installed("delete", "fround", name, "-n", HUB, "--ignore-not-found", "--timeout=60s")


def ledger(store: ObjectStore, namespace: str) -> Chain:
    uri = f"s3://{BUCKET}/ledger/{namespace}/notes/"
    return read(store, uri, NamespacedName(namespace=namespace, name="notes"))


def jobs(kubectl: Kubectl, namespaces: list[str], run_key: str) -> list[str]:
    label = f"-l{names.RUN_KEY}={run_key}"
    return [
        job["metadata"]["name"]
        for namespace in namespaces
        for job in kubectl.get("jobs", "-n", namespace, label)["items"]
    ]


def client_status(kubectl: Kubectl, namespace: str) -> Object:
    found: Object = kubectl.get("fclient", "notes", "-n", namespace).get("status", {})
    return found


def reasons(status: Object) -> dict[str, str]:
    return {failed["client"]: failed["reason"] for failed in status.get("failedClients", [])}


def test_a_round_runs_to_its_end_and_never_again(
    rounds: Rounds, workers: WorkerDouble, tenants: list[str], store: ObjectStore, installed: Kubectl
) -> None:
    workers.will(tenants[0], CRASH)
    dataset = {"uri": f"s3://{BUCKET}/datasets/public.jsonl", "digest": DIGEST}
    manifest = rounds.manifest("whole", evaluation={"dataset": dataset})
    name = rounds.apply(manifest)
    rounds.becomes(name, "RoundComplete")
    status = rounds.status(name)
    metrics = {metric["name"]: metric["value"] for metric in status["metrics"]}
    assert (metrics["baselineLoss"], metrics["loss"]) == ("2.5", "2.25")
    assert status["clientsSummary"] == "3/3"
    assert status["privacy"]["noiseToSignal"]
    assert workers.started == {
        f"{tenants[0]}/train": 2,
        f"{tenants[1]}/train": 1,
        f"{tenants[2]}/train": 1,
        f"{HUB}/aggregate": 1,
        f"{HUB}/evaluate": 1,
    }
    for namespace in tenants:
        eventually(lambda ns=namespace: ledger(store, ns).state(status["runKey"]) is LedgerKind.SETTLE)
        kinds = [entry.kind for entry in ledger(store, namespace).entries]
        assert kinds == [LedgerKind.RESERVE, LedgerKind.LAUNCH, LedgerKind.SETTLE]
        eventually(lambda ns=namespace: client_status(installed, ns)["privacy"].get("ledgerEntries") == 3)
        privacy = client_status(installed, namespace)["privacy"]
        assert 0.5 < float(privacy["spentEpsilon"]) <= 1.01
        assert float(privacy["reservedEpsilon"]) == 0

    rounds.delete(name)
    eventually(lambda: not jobs(installed, [*tenants, HUB], status["runKey"]))
    before = dict(workers.started)
    rounds.apply(manifest)
    rounds.becomes(name, "RoundComplete")
    assert rounds.status(name)["model"] == status["model"]
    assert jobs(installed, [*tenants, HUB], status["runKey"]) == []
    assert workers.started == before
    assert len(ledger(store, tenants[0]).entries) == 3


STALLS: list[tuple[str, str, Callable[[Rounds], Object]]] = [
    (
        "quorum",
        "QuorumImpossible",
        lambda r: {"clients": {**r.manifest("x")["spec"]["clients"], "minAvailable": 9}},
    ),
    ("nobody", "NoClientSelected", lambda r: {"clients": {"selector": {"matchLabels": {"suite": "none"}}}}),
    (
        "missing",
        "ModelMissing",
        lambda r: {"baseModel": {"uri": f"s3://{BUCKET}/models/none", "digest": DIGEST}},
    ),
    ("digest", "ModelDigestMismatch", lambda r: {"baseModel": {"uri": r.base_model.uri, "digest": DIGEST}}),
    ("base", "BaseRoundMissing", lambda r: {"baseModel": {"roundRef": {"name": "nowhere"}}}),
]


@pytest.mark.parametrize(("name", "reason", "spec"), STALLS, ids=[stall[0] for stall in STALLS])
def test_what_cannot_go_on_says_why_and_starts_nothing(  # noqa: PLR0917 - fixtures
    rounds: Rounds, workers: WorkerDouble, store: ObjectStore, tenants: list[str], name: str, reason: str,
    spec: Callable[[Rounds], Object],
) -> None:  # fmt: skip
    before = [len(ledger(store, tenant).entries) for tenant in tenants]
    created = rounds.apply(rounds.manifest(name, **spec(rounds)))
    rounds.becomes(created, reason)
    stalled = {c["type"]: c["status"] for c in rounds.status(created)["conditions"]}
    assert (stalled["Ready"], stalled["Stalled"]) == ("False", "True")
    assert not workers.started
    assert [len(ledger(store, tenant).entries) for tenant in tenants] == before


def test_who_fails_is_named_and_the_quorum_goes_on(
    rounds: Rounds, workers: WorkerDouble, tenants: list[str], store: ObjectStore
) -> None:
    workers.will(tenants[0], OUT_OF_MEMORY)
    workers.will(tenants[1], failing(Reason.DATA_EMPTY))
    selected = rounds.manifest("x")["spec"]["clients"]
    name = rounds.apply(rounds.manifest("partial", clients={**selected, "minAvailable": 1}))
    rounds.becomes(name, "RoundComplete")
    assert reasons(rounds.status(name)) == {
        f"{tenants[0]}/notes": "OOMKilled",
        f"{tenants[1]}/notes": "DataEmpty",
    }
    assert rounds.status(name)["clientsSummary"] == "1/3"
    run_key = rounds.status(name)["runKey"]
    # Neither had launched: what never ran is given back.
    eventually(lambda: ledger(store, tenants[0]).state(run_key) is LedgerKind.RELEASE)


def test_a_round_without_its_quorum_fails_for_good(
    rounds: Rounds, workers: WorkerDouble, tenants: list[str]
) -> None:
    workers.will(tenants[0], failing(Reason.NON_FINITE_DELTA))
    name = rounds.apply(rounds.manifest("failing"))
    rounds.becomes(name, "QuorumLost")
    eventually(
        lambda: {c["type"]: c["status"] for c in rounds.status(name)["conditions"]}.get("Failed") == "True"
    )
    assert reasons(rounds.status(name)) == {f"{tenants[0]}/notes": "NonFiniteDelta"}


def test_the_operator_is_killed_in_the_middle_and_the_round_goes_on(
    rounds: Rounds, workers: WorkerDouble, tenants: list[str], operating: OperatorProcess, store: ObjectStore
) -> None:
    for tenant in tenants[:2]:
        workers.will(tenant, HANG)
    name = rounds.apply(rounds.manifest("killed"))
    eventually(
        lambda: (
            rounds.status(name).get("clients", {}).get("running") == 2
            and rounds.status(name)["clients"]["submitted"] == 1
        ),
        timeout_seconds=WAIT_SECONDS,
    )
    operating.kill()
    before = [len(ledger(store, tenant).entries) for tenant in tenants]
    operating.start()
    rounds.kubectl("patch", "fround", name, "-n", HUB, "--type=merge", "-p", '{"spec": {"suspend": true}}')
    rounds.becomes(name, "Suspended")
    run_key = rounds.status(name)["runKey"]
    eventually(lambda: len(jobs(rounds.kubectl, tenants, run_key)) == 1)
    assert [len(ledger(store, tenant).entries) for tenant in tenants] == before
    rounds.kubectl("patch", "fround", name, "-n", HUB, "--type=merge", "-p", '{"spec": {"suspend": false}}')
    rounds.becomes(name, "RoundComplete")
    assert workers.started[f"{tenants[2]}/train"] == 1
    for tenant in tenants:
        eventually(lambda ns=tenant: ledger(store, ns).state(run_key) is LedgerKind.SETTLE)
        mine = [entry.kind for entry in ledger(store, tenant).entries if entry.run_key == run_key]
        assert mine == [LedgerKind.RESERVE, LedgerKind.LAUNCH, LedgerKind.SETTLE]


def test_deleting_a_running_round_removes_its_children_everywhere(
    rounds: Rounds, workers: WorkerDouble, tenants: list[str]
) -> None:
    for tenant in tenants:
        workers.will(tenant, HANG)
    name = rounds.apply(rounds.manifest("deleted"))
    eventually(
        lambda: rounds.status(name).get("clients", {}).get("running") == 3, timeout_seconds=WAIT_SECONDS
    )
    run_key = rounds.status(name)["runKey"]
    rounds.delete(name)
    eventually(lambda: jobs(rounds.kubectl, tenants, run_key) == [])


def test_consent_ends_while_the_worker_runs(
    rounds: Rounds, workers: WorkerDouble, tenants: list[str], installed: Kubectl
) -> None:
    workers.will(tenants[0], HANG)
    selected = rounds.manifest("x")["spec"]["clients"]
    name = rounds.apply(rounds.manifest("withdrawn", clients={**selected, "minAvailable": 2}))
    eventually(
        lambda: rounds.status(name).get("clients", {}).get("running") == 1, timeout_seconds=WAIT_SECONDS
    )
    suspend(installed, tenants[0], True)
    try:
        rounds.becomes(name, "RoundComplete")
        assert reasons(rounds.status(name)) == {f"{tenants[0]}/notes": "Suspended"}
        eventually(lambda: client_ready(installed, tenants[0]) == ("False", "Suspended"))
    finally:
        suspend(installed, tenants[0], False)


def suspend(kubectl: Kubectl, namespace: str, value: bool) -> None:
    change = f'{{"spec": {{"suspend": {str(value).lower()}}}}}'
    kubectl("patch", "fclient", "notes", "-n", namespace, "--type=merge", "-p", change)


def client_ready(kubectl: Kubectl, namespace: str) -> tuple[str, str]:
    (ready,) = [c for c in client_status(kubectl, namespace)["conditions"] if c["type"] == "Ready"]
    return ready["status"], ready["reason"]


def test_what_the_budget_does_not_hold_is_excluded_before_anything_starts(
    rounds: Rounds, workers: WorkerDouble, tenants: list[str], installed: Kubectl
) -> None:
    spent = float(client_status(installed, tenants[0])["privacy"]["spentEpsilon"])
    tight = {"privacy": {"budget": {"epsilon": f"{spent + 0.1:.3f}"}}}
    wide = {"privacy": {"budget": {"epsilon": "8"}}}
    patch_client(installed, tenants[0], tight)
    try:
        name = rounds.apply(rounds.manifest("budget"))
        rounds.becomes(name, "RoundComplete")
        assert reasons(rounds.status(name)) == {f"{tenants[0]}/notes": "BudgetExceeded"}
        assert workers.started[f"{tenants[0]}/train"] == 0
    finally:
        patch_client(installed, tenants[0], wide)


def patch_client(kubectl: Kubectl, namespace: str, spec: Object) -> None:
    kubectl("patch", "fclient", "notes", "-n", namespace, "--type=merge", "-p", json.dumps({"spec": spec}))


def test_events_tell_transitions_once(rounds: Rounds, workers: WorkerDouble) -> None:
    name = rounds.apply(rounds.manifest("events"))
    rounds.becomes(name, "RoundComplete")
    found = rounds.kubectl.get("events", "-n", HUB, f"--field-selector=involvedObject.name={name}")["items"]
    told = [event["reason"] for event in found]
    assert sorted(told) == sorted(set(told)), f"an event was repeated: {told}"
    assert {"Planning", "Training", "Aggregating", "RoundComplete"} <= set(told)


def test_the_store_is_away_for_a_while(
    rounds: Rounds, workers: WorkerDouble, tenants: list[str], road_to_store: PausingProxy
) -> None:
    road_to_store.switch(False)
    name = rounds.apply(rounds.manifest("away"))
    rounds.becomes(name, "StoreUnreachable")
    assert not workers.started
    road_to_store.switch(True)
    rounds.becomes(name, "RoundComplete")
    assert rounds.status(name)["clientsSummary"] == "3/3"


def test_a_round_starts_from_another_rounds_model(
    rounds: Rounds, workers: WorkerDouble, tenants: list[str]
) -> None:
    base = rounds.manifest("base")
    follower = rounds.manifest("follower", baseModel={"roundRef": {"name": base["metadata"]["name"]}})
    second = rounds.apply(follower)
    rounds.becomes(second, "BaseRoundMissing")
    first = rounds.apply(base)
    rounds.becomes(second, "RoundComplete")
    assert rounds.status(second)["baseModel"] == rounds.status(first)["model"]


def test_a_gang_meets_at_a_service_that_its_job_owns(
    rounds: Rounds, workers: WorkerDouble, tenants: list[str], installed: Kubectl
) -> None:
    patch_client(installed, tenants[0], {"worker": {"nodes": 2}})
    workers.will(tenants[0], HANG, HANG)
    try:
        name = rounds.apply(rounds.manifest("gang"))
        eventually(lambda: workers.started[f"{tenants[0]}/train"] == 2, timeout_seconds=WAIT_SECONDS)
        run_key = rounds.status(name)["runKey"]
        (job,) = jobs(installed, tenants[:1], run_key)
        (service,) = installed.get("services", "-n", tenants[0], f"-l{names.RUN_KEY}={run_key}")["items"]
        (owner,) = service["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"], service["metadata"]["name"]) == ("Job", job, job)
        pods = installed.get("pods", "-n", tenants[0], f"-l{names.JOB_NAME}={job}")["items"]
        assert {pod["spec"]["subdomain"] for pod in pods} == {job}
        assert {pod["spec"]["hostname"] for pod in pods} == {f"{job}-0", f"{job}-1"}
    finally:
        patch_client(installed, tenants[0], {"worker": {"nodes": 1}})


def test_an_owner_without_the_chart_is_left_out_with_what_to_do(
    rounds: Rounds, workers: WorkerDouble, tenants: list[str], installed: Kubectl, suite: str
) -> None:
    elsewhere = installed.namespace(f"{suite}-d")
    client = installed.get("fclient", "notes", "-n", tenants[0])
    kept = {key: client[key] for key in ("apiVersion", "kind", "spec")}
    installed.apply(
        {**kept, "metadata": {"name": "notes", "namespace": elsewhere, "labels": {"suite": suite}}}
    )
    try:
        name = rounds.apply(rounds.manifest("no-access"))
        rounds.becomes(name, "RoundComplete")
        (failed,) = rounds.status(name)["failedClients"]
        assert (failed["client"], failed["reason"]) == (f"{elsewhere}/notes", "NoAccess")
        assert "tributary-client" in failed["message"]
    finally:
        installed("delete", "namespace", elsewhere, "--wait=false")

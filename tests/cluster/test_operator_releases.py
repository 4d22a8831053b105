"""Releases under the real operator, API server, Deployment and Job controllers and S3; pods are doubled.

All the while a watcher compares what the Service selects with the Deployment behind it.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import pytest
from installation import BUCKET, HUB, OPERATOR
from kube import Kubectl, Object, Refused, eventually
from operator_process import OperatorProcess, operator_kubeconfig
from worker_double import WorkerDouble

from tributary_api.base import API_VERSION
from tributary_api.records import OutcomeKind, RoundOutcome
from tributary_api.round import FederatedRound
from tributary_api.shared import ModelRef, StoreEndpoint
from tributary_dev import cluster as dev
from tributary_operator import names
from tributary_store import bundle
from tributary_store.keys import Layout
from tributary_store.objectstore import ObjectStore

pytestmark = pytest.mark.cluster

WAIT_SECONDS = 90
ANALYSIS_SECONDS = 4
DELAY_SECONDS = 8
DIGEST = "sha256:" + "d" * 64


@pytest.fixture(scope="module")
def store(running: dev.Cluster, installed: Kubectl) -> ObjectStore:
    s3 = running.s3
    endpoint = StoreEndpoint(endpoint=s3.endpoint_for_host, region=s3.region)
    return ObjectStore.open(endpoint, s3.access_key, s3.secret_key)


@pytest.fixture(scope="module")
def models(store: ObjectStore, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], ModelRef]:
    """Publishes another model each time."""

    def publish() -> ModelRef:
        directory = tmp_path_factory.mktemp("model")
        (directory / "config.json").write_text('{"model_type": "gpt2"}')
        header = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
        weights = len(header).to_bytes(8, "little") + header + secrets.token_bytes(16)
        (directory / "model.safetensors").write_bytes(weights)
        return bundle.push(store, directory, f"s3://{BUCKET}/models/")

    return publish


@pytest.fixture(scope="module")
def operating(
    installed: Kubectl, running: dev.Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[OperatorProcess]:
    place = tmp_path_factory.mktemp("operator")
    s3 = running.s3
    config = operator_kubeconfig(installed, place / "kubeconfig")
    process = OperatorProcess(config, place / "log", s3.endpoint_for_host, s3.access_key, s3.secret_key)
    process.start()
    yield process
    print(process.log.read_text()[-20000:])
    assert process.stop() == 0


@pytest.fixture
def workers(installed: Kubectl, store: ObjectStore) -> Iterator[WorkerDouble]:
    with WorkerDouble(installed, store, [HUB]) as double:
        yield double


@dataclass
class Watcher:
    """Reads the Service over and over, and the Deployment of the revision that it selects."""

    kubectl: Kubectl
    name: str
    selected: list[str] = field(default_factory=list)
    """Revisions in the order of service."""
    violations: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Watcher:
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _live(self) -> None:
        while not self._stop.wait(0.1):
            listing = self.kubectl.get("services,deployments", "-n", HUB, f"-l{names.RELEASE}={self.name}")
            by_kind: dict[str, list[Object]] = {"Service": [], "Deployment": []}
            for item in listing["items"]:
                by_kind[item["kind"]].append(item)
            for service in by_kind["Service"]:
                self._look(service["spec"]["selector"][names.REVISION], by_kind["Deployment"])

    def _look(self, revision: str, deployments: list[Object]) -> None:
        if not self.selected or self.selected[-1] != revision:
            self.selected.append(revision)
        ready = {
            d["metadata"]["labels"][names.REVISION]: d["status"].get("readyReplicas", 0) for d in deployments
        }
        if ready.get(revision, 0) < 1:
            self.violations.append(f"{revision} is selected, ready are {ready}")


class Release:
    """One ModelRelease, and what becomes of it."""

    def __init__(self, kubectl: Kubectl, model: ModelRef) -> None:
        self.kubectl = kubectl
        self.name = f"release-{secrets.token_hex(4)}"
        self.spec: Object = {
            "model": model.to_json_object(),
            "compression": [{"quantize": {"scheme": "Int8"}}],
            "gate": {
                "dataset": {"uri": f"s3://{BUCKET}/datasets/public.jsonl", "digest": DIGEST},
                "metrics": [{"margin": "0.02"}],
            },
            "serving": {"serviceName": self.name, "replicas": 2},
            "strategy": {
                "blueGreen": {
                    "scaleDownDelaySeconds": DELAY_SECONDS,
                    "postPromotion": {"analysisSeconds": ANALYSIS_SECONDS},
                }
            },
        }
        self.apply()

    def apply(self, **spec: Any) -> None:
        self.spec = {**self.spec, **spec}
        metadata = {"name": self.name, "namespace": HUB}
        manifest = {
            "apiVersion": API_VERSION,
            "kind": "ModelRelease",
            "metadata": metadata,
            "spec": self.spec,
        }
        self.kubectl.apply(manifest)

    def serve(self, model: ModelRef) -> None:
        self.apply(model=model.to_json_object())

    @property
    def raw(self) -> Object:
        return self.kubectl.get("mrel", self.name, "-n", HUB)

    @property
    def status(self) -> Object:
        found: Object = self.raw.get("status", {})
        return found

    def condition(self, type_: str) -> tuple[str, str]:
        """Status and reason; ("", "") while it is not about the present spec."""
        raw = self.raw
        for condition in raw.get("status", {}).get("conditions", []):
            if (
                condition["type"] == type_
                and condition.get("observedGeneration") == raw["metadata"]["generation"]
            ):
                return condition["status"], condition["reason"]
        return "", ""

    def settles(self, model: ModelRef) -> str:
        """Waits until nothing is left to do and this model serves. Gives its revision."""

        def is_settled() -> bool:
            stable = self.status.get("stable", {}).get("parent")
            done = self.condition("Reconciling")[0] == "False"
            return done and stable == model.to_json_object() and len(self.children("deployments")) == 1

        self.eventually(is_settled)
        revision: str = self.status["stable"]["revision"]
        return revision

    def eventually(self, check: Callable[[], bool]) -> None:
        try:
            eventually(check, timeout_seconds=WAIT_SECONDS)
        except AssertionError:
            print(json.dumps(self.raw, indent=1), self.kubectl("get", "deployments,pods,jobs", "-n", HUB))
            raise

    def children(self, kind: str) -> list[Object]:
        found: list[Object] = self.kubectl.get(kind, "-n", HUB, f"-l{names.RELEASE}={self.name}")["items"]
        return found

    @property
    def selected(self) -> str:
        services = self.children("services")
        return services[0]["spec"]["selector"][names.REVISION] if services else ""


@pytest.fixture
def release(
    installed: Kubectl,
    operating: OperatorProcess,
    workers: WorkerDouble,
    models: Callable[[], ModelRef],
) -> Iterator[Release]:
    """A release whose first model serves."""
    first = models()
    found = Release(installed, first)
    try:
        found.settles(first)
        yield found
    finally:
        installed("delete", "mrel", found.name, "-n", HUB, "--wait=false", "--ignore-not-found")


def test_a_model_replaces_another_and_the_service_always_has_pods(
    installed: Kubectl, release: Release, models: Callable[[], ModelRef]
) -> None:
    first = release.selected
    second = models()
    with Watcher(installed, release.name) as watcher:
        release.serve(second)
        revision = release.settles(second)
        time.sleep(1)
    assert watcher.selected == [first, revision]
    assert watcher.violations == []
    status = release.status
    assert (status["stable"]["bytes"], status["stable"]["parentBytes"]) == (100, 400)
    assert {"name": "parentLoss", "value": "3"} in status["stable"]["metrics"]
    assert [r["revision"] for r in status["history"]] == [first]
    assert release.condition("Ready") == ("True", "Serving")
    assert len(release.children("poddisruptionbudgets")) == 1


def test_going_back_starts_no_pod_and_no_job(
    release: Release, workers: WorkerDouble, models: Callable[[], ModelRef]
) -> None:
    first, old_model = release.selected, ModelRef.model_validate(release.spec["model"])
    second = models()
    release.serve(second)
    release.eventually(lambda: release.selected not in {"", first})
    release.eventually(lambda: release.condition("Reconciling")[0] == "False")
    pods, jobs = workers.started[f"{HUB}/serve"], {j["metadata"]["name"] for j in release.children("jobs")}
    release.serve(old_model)
    release.eventually(lambda: release.selected == first)
    assert workers.started[f"{HUB}/serve"] == pods
    assert {j["metadata"]["name"] for j in release.children("jobs")} == jobs


def test_a_failed_gate_leaves_everything_as_it_was(
    installed: Kubectl, release: Release, workers: WorkerDouble, models: Callable[[], ModelRef]
) -> None:
    first, pods = release.selected, workers.started[f"{HUB}/serve"]
    workers.verdicts.append("FAIL")
    with Watcher(installed, release.name) as watcher:
        release.serve(models())
        release.eventually(lambda: release.condition("Stalled") == ("True", "Worse"))
        jobs = len(release.children("jobs"))
        time.sleep(5)
    assert release.condition("Ready") == ("True", "Serving")
    assert (watcher.selected, watcher.violations) == ([first], [])
    assert workers.started[f"{HUB}/serve"] == pods, "no pod of a model that failed"
    assert len(release.children("jobs")) == jobs, "and it is not tried over and over"
    (rejected,) = release.status["rejectedRevisions"]
    assert rejected["stable"] == first


def test_a_revision_that_loses_a_pod_is_switched_away_from(
    release: Release, models: Callable[[], ModelRef]
) -> None:
    first = release.selected
    release.serve(models())
    release.eventually(lambda: release.selected not in {"", first})
    second = release.selected
    pods = [p for p in release.children("pods") if p["metadata"]["labels"].get(names.REVISION) == second]
    lose(release.kubectl, pods[0])
    release.eventually(lambda: release.selected == first)
    release.eventually(lambda: release.condition("Stalled") == ("True", "AnalysisFailed"))
    assert release.condition("Ready") == ("True", "Serving")
    release.eventually(lambda: len(release.children("deployments")) == 1)


def lose(kubectl: Kubectl, pod: Object) -> None:
    """Its readiness probe fails."""
    change = {"status": {"conditions": [{"type": "Ready", "status": "False"}]}}
    where = ["-n", HUB, pod["metadata"]["name"], "--subresource=status", "--type=merge"]
    kubectl("patch", "pod", *where, "-p", json.dumps(change))


def test_an_operator_that_is_killed_again_and_again_gets_there(
    installed: Kubectl, release: Release, operating: OperatorProcess, models: Callable[[], ModelRef]
) -> None:
    first, second = release.selected, models()
    jobs = len(release.children("jobs"))
    with Watcher(installed, release.name) as watcher:
        release.serve(second)
        for seconds in (0.3, 1.0, 2.0):
            operating.kill()
            operating.start()
            time.sleep(seconds)
        revision = release.settles(second)
    assert (watcher.selected, watcher.violations) == ([first, revision], [])
    assert len(release.children("jobs")) == jobs + 2, "one compression and one gate"


def test_a_service_of_somebody_else_is_not_taken(
    installed: Kubectl, operating: OperatorProcess, workers: WorkerDouble, models: Callable[[], ModelRef]
) -> None:
    name = f"other-{secrets.token_hex(4)}"
    spec = {"selector": {"app": "other"}, "ports": [{"port": 80}]}
    metadata = {"name": name, "namespace": HUB}
    installed.apply({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec})
    release = Release(installed, models())
    release.apply(serving={"serviceName": name, "replicas": 1})
    try:
        release.eventually(lambda: release.condition("Stalled") == ("True", "ServiceTaken"))
        assert installed.get("service", name, "-n", HUB)["spec"]["selector"] == {"app": "other"}
    finally:
        installed("delete", f"mrel/{release.name}", f"service/{name}", "-n", HUB, "--wait=false")


def test_a_missing_model_is_said_and_nothing_is_started(
    installed: Kubectl, operating: OperatorProcess, workers: WorkerDouble
) -> None:
    release = Release(installed, ModelRef(uri=f"s3://{BUCKET}/models/nowhere", digest=DIGEST))
    try:
        release.eventually(lambda: release.condition("Stalled") == ("True", "ModelMissing"))
        assert release.condition("Ready") == ("False", "ModelMissing")
        assert release.children("jobs") == []
    finally:
        installed("delete", f"mrel/{release.name}", "-n", HUB, "--wait=false")


def test_a_model_that_a_round_made_is_resolved_once(
    installed: Kubectl,
    release: Release,
    operating: OperatorProcess,
    store: ObjectStore,
    models: Callable[[], ModelRef],
) -> None:
    """The round may be deleted afterwards, and the operator forget everything."""
    name = f"made-{secrets.token_hex(4)}"
    model, fedround = models(), idle_round(installed, name)
    outcome = RoundOutcome(
        run_key=fedround.run_key,
        round=fedround.ref,
        outcome=OutcomeKind.COMPLETE,
        reason="RoundComplete",
        model=model,
        finished_at=datetime.now(UTC),
    )
    store.put_new(Layout(BUCKET).outcome(fedround.run_key), outcome.canonical_json())
    release.apply(model={"roundRef": {"name": name}})
    release.settles(model)
    operating.kill()
    installed("patch", "fround", name, "-n", HUB, "--type=merge", '-p={"metadata": {"finalizers": null}}')
    installed("delete", "fround", name, "-n", HUB, "--ignore-not-found")
    operating.start()
    time.sleep(3)
    assert release.condition("Stalled")[0] == "False"
    release.settles(model)


def idle_round(installed: Kubectl, name: str) -> FederatedRound:
    """A round that does nothing by itself."""
    spec = {
        "suspend": True,
        "baseModel": {"uri": f"s3://{BUCKET}/models/none", "digest": DIGEST},
        "clients": {"selector": {"matchLabels": {"suite": name}}},
        "method": {"lora": {}},
        "training": {"maxSteps": 2, "expectedBatchSize": 64, "learningRate": "1e-3"},
        "privacy": {"epsilon": "1", "delta": "1e-6"},
    }
    metadata = {"name": name, "namespace": HUB}
    kind = {"apiVersion": API_VERSION, "kind": "FederatedRound"}
    return FederatedRound.model_validate(installed.create({**kind, "metadata": metadata, "spec": spec}))


def test_scaling_reaches_the_pods_and_is_reported(installed: Kubectl, release: Release) -> None:
    installed("scale", f"mrel/{release.name}", "-n", HUB, "--replicas=3")
    release.eventually(lambda: release.status.get("replicas") == 3)
    selected = installed.get("pods", "-n", HUB, f"-l{release.status['selector']}")["items"]
    assert len(selected) == 3
    assert len(release.children("deployments")) == 1


def test_a_deleted_release_leaves_nothing_even_without_the_operator(
    installed: Kubectl, release: Release, operating: OperatorProcess
) -> None:
    operating.kill()
    installed("delete", "mrel", release.name, "-n", HUB, "--timeout=30s")

    def is_empty() -> bool:
        kinds = "services,deployments,jobs,poddisruptionbudgets"
        return not release.children(kinds)

    eventually(is_empty, timeout_seconds=WAIT_SECONDS)
    operating.start()


def test_the_operator_may_not_serve_another_image(installed: Kubectl, release: Release) -> None:
    """Admission holds for the operator's Deployments, too."""
    (deployment,) = release.children("deployments")
    change = [{"op": "replace", "path": "/spec/template/spec/containers/0/image", "value": "localhost/evil"}]
    where = ["-n", HUB, deployment["metadata"]["name"], "--type=json"]
    with pytest.raises(Refused, match="workerImage"):
        installed.impersonate(OPERATOR)("patch", "deployment", *where, "-p", json.dumps(change))

"""The kinds on a real API server: bad input is refused with what to change."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import yaml
from kube import PINNED, ROOT, Kubectl, Object, Refused

pytestmark = pytest.mark.cluster

DIGEST = "sha256:" + "a" * 64


def fround(namespace: str, name: str = "r1") -> Object:
    return {
        "apiVersion": "tributary.dev/v1alpha1",
        "kind": "FederatedRound",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "baseModel": {"uri": "s3://tributary/models/a", "digest": DIGEST},
            "clients": {"selector": {"matchLabels": {"role": "owner"}}},
            "method": {"lora": {"rank": 8}},
            "training": {"maxSteps": 5, "expectedBatchSize": 64, "learningRate": "1e-3"},
            "privacy": {"epsilon": "2", "delta": "1e-6"},
        },
    }


def client(namespace: str, name: str = "notes") -> Object:
    return {
        "apiVersion": "tributary.dev/v1alpha1",
        "kind": "FederatedClient",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "data": {"name": "notes", "uri": "s3://clinic-a/notes/", "numExamples": 20000},
            "store": {"credentialsSecret": "tributary-store"},
            "consent": {"hubs": [{"namespace": "hub"}], "expires": "2027-06-30T00:00:00Z"},
            "privacy": {
                "budget": {"epsilon": "8", "delta": "1e-6"},
                "maxRoundEpsilon": "2",
                "ledgerUri": "s3://tributary/ledger/clinic-a/notes/",
            },
            "worker": {"allowedImages": [f"localhost/w{PINNED}"]},
        },
    }


def release(namespace: str, name: str = "assistant") -> Object:
    return {
        "apiVersion": "tributary.dev/v1alpha1",
        "kind": "ModelRelease",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "model": {"uri": "s3://tributary/models/a", "digest": DIGEST},
            "gate": {
                "dataset": {"uri": "s3://tributary/datasets/p.jsonl", "digest": DIGEST},
                "metrics": [{"margin": "0.02"}],
            },
            "serving": {"serviceName": "assistant"},
        },
    }


MAKERS = {"client": client, "round": fround, "release": release}
REMOVED = object()


def changed(manifest: Object, path: str, value: object) -> Object:
    """A copy with the field at the dotted path set, or removed."""
    copy = deepcopy(manifest)
    *parents, last = path.split(".")
    place = copy
    for parent in parents:
        place = place.setdefault(parent, {})
    if value is REMOVED:
        del place[last]
    else:
        place[last] = value
    return copy


@pytest.mark.parametrize("kind", MAKERS)
def test_a_good_object_is_accepted_and_not_yet_healthy(installed: Kubectl, namespace: str, kind: str) -> None:
    created = installed.create(MAKERS[kind](namespace, "good"))
    assert created["status"]["conditions"] == [
        {
            "type": "Ready",
            "status": "Unknown",
            "reason": "Waiting",
            "message": "Waiting for the operator",
            "lastTransitionTime": "1970-01-01T00:00:00Z",
        }
    ]


@pytest.mark.parametrize("kind", MAKERS)
def test_defaults_are_those_of_the_contract(installed: Kubectl, namespace: str, kind: str) -> None:
    """The API server and the Pydantic models fill in the same values."""
    from tributary_api import client as c
    from tributary_api import release as rel
    from tributary_api import round as r

    model: Any = {"client": c.FederatedClient, "round": r.FederatedRound, "release": rel.ModelRelease}[kind]
    manifest = MAKERS[kind](namespace, "defaulted")
    stored = installed.create(manifest, "--dry-run=server")
    ours = model.model_validate(manifest).spec
    assert model.model_validate(stored).spec == ours
    # Nothing is left to default when the operator reads it: a later version may have other defaults.
    assert _leaves(ours.to_json_object()) == _leaves(stored["spec"])


def _leaves(value: object, path: str = "") -> set[str]:
    if isinstance(value, dict) and value:
        return {leaf for key, child in value.items() for leaf in _leaves(child, f"{path}.{key}")}
    return {path}


def optimizer(**changes: str) -> Object:
    return {"name": "FedAdam", "learningRate": "1e-2", **changes}


REFUSALS = [
    ("round", "spec.privacy.epsilon", "0", "epsilon must be above 0"),
    ("round", "spec.privacy.epsilon", "-1", "should match"),
    ("round", "spec.privacy.epsilon", 1.5, "must be of type string"),
    ("round", "spec.privacy.delta", "1", "delta must be above 0 and below 1"),
    ("round", "spec.privacy.delta", "0", "delta must be above 0 and below 1"),
    ("round", "spec.privacy.maxGradNorm", "0", "maxGradNorm must be above 0"),
    ("round", "spec.privcy", {}, 'unknown field "spec.privcy"'),
    ("round", "spec.training.maxStep", 3, 'unknown field "spec.training.maxStep"'),
    ("round", "spec.baseModel", {"uri": "s3://tributary/m"}, "uri and digest go together"),
    ("round", "spec.baseModel", {}, "give either uri and digest, or roundRef"),
    ("round", "spec.baseModel.roundRef", {"name": "r0"}, "give either uri and digest, or roundRef"),
    ("round", "spec.method.full", {}, "choose one of lora and full"),
    ("round", "spec.method", {}, "choose one of lora and full"),
    ("round", "spec.training.deepspeed", {"zeroStage": 4}, "less than or equal to 3"),
    ("round", "spec.training.baseDtype", "Float16", "Unsupported value"),
    ("round", "spec.clients.minAvailable", "120%", "should match"),
    ("round", "spec.training.learningRate", "0", "learningRate must be above 0"),
    ("round", "spec.training", REMOVED, "spec.training: Required value"),
    ("round", "spec.aggregation", {"strategy": "Best"}, "Unsupported value"),
    ("round", "spec.aggregation", {"strategy": "Krum"}, "byzantineClients goes with"),
    ("round", "spec.aggregation", {"byzantineClients": 1}, "byzantineClients goes with"),
    (
        "round",
        "spec.aggregation",
        {"strategy": "Median", "normBound": "1"},
        "normBound goes with NormBounding",
    ),
    (
        "round",
        "spec.aggregation",
        {"strategy": "NormBounding", "normBound": "0"},
        "normBound must be above 0",
    ),
    ("round", "spec.aggregation", {"deltaEncoding": "int8"}, "Unsupported value"),
    ("round", "spec.aggregation", {"parallelism": 0}, "greater than or equal to 1"),
    ("round", "spec.aggregation.serverOptimizer", {"name": "FedAdam"}, "learningRate: Required value"),
    (
        "round",
        "spec.aggregation.serverOptimizer",
        optimizer(learningRate="0"),
        "learningRate must be above 0",
    ),
    ("round", "spec.aggregation.serverOptimizer", optimizer(beta1="1"), "beta1 and beta2 must be below 1"),
    ("round", "spec.aggregation.serverOptimizer", optimizer(beta2="1.0"), "beta1 and beta2 must be below 1"),
    ("round", "spec.aggregation.serverOptimizer", optimizer(tau="0"), "tau must be above 0"),
    ("client", "spec.consent.hubs", [], "spec.consent.hubs"),
    ("client", "spec.consent.expires", "tomorrow", "date-time"),
    ("client", "spec.privacy.budget.epsilon", "0.0", "epsilon must be above 0"),
    ("client", "spec.privacy.budget.delta", "1.0", "delta must be above 0 and below 1"),
    ("client", "spec.worker.allowedImages", ["worker:latest"], "should match"),
    ("client", "spec.worker.allowedImages", [], "spec.worker.allowedImages"),
    ("client", "spec.data.numExamples", 0, "greater than or equal to 1"),
    ("client", "spec.data.uri", "https://clinic/notes", "should match"),
    ("client", "spec.store.credentialsSecret", "registry-password", "must start with tributary-"),
    ("client", "spec.privacy.noiseKeySecret", "registry-password", "must start with tributary-"),
    ("release", "spec.gate.metrics", [{"margin": "0"}], "margin must be above 0"),
    ("release", "spec.gate.confidence", "1", "confidence must lie between 0.5 and 1"),
    ("release", "spec.compression", [{}], "a compression step must name one thing to do"),
    ("release", "spec.model", {}, "give either uri and digest, or roundRef"),
    (
        "release",
        "spec.strategy",
        {"blueGreen": {"scaleDownDelaySeconds": 5, "postPromotion": {"analysisSeconds": 9}}},
        "scaleDownDelaySeconds must be at least postPromotion.analysisSeconds",
    ),
]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda r: f"{r[0]}-{r[1]}-{r[2]}"[:70])
def test_bad_input_is_refused_with_what_to_change(
    installed: Kubectl, namespace: str, refusal: tuple[str, str, object, str]
) -> None:
    kind, path, value, message = refusal
    with pytest.raises(Refused) as refused:
        installed.create(changed(MAKERS[kind](namespace), path, value), "--dry-run=server")
    assert message in str(refused.value)


STRATEGIES = [
    ({"strategy": "Krum", "byzantineClients": 2}, 7),
    ({"strategy": "MultiKrum", "byzantineClients": 1}, 5),
    ({"strategy": "TrimmedMean", "byzantineClients": 2}, 5),
    ({"strategy": "Median"}, 3),
    ({"strategy": "GeometricMedian"}, 3),
    ({"strategy": "NormBounding"}, 3),
    ({"strategy": "NormBounding", "normBound": "2.5"}, 1),
    ({"strategy": "FedAvg", "serverOptimizer": optimizer()}, 1),
]


@pytest.mark.parametrize(("aggregation", "clients_min"), STRATEGIES, ids=lambda value: str(value)[:70])
def test_too_few_clients_for_a_strategy_are_refused_before_anything_is_spent(
    installed: Kubectl, namespace: str, aggregation: Object, clients_min: int
) -> None:
    from tributary_api.aggregation import Aggregation

    assert Aggregation.model_validate(aggregation).clients_min == clients_min
    wanted = changed(fround(namespace), "spec.aggregation", aggregation)
    for field in ("spec.clients.minAvailable", "spec.clients.sample.count"):
        installed.create(changed(wanted, field, clients_min), "--dry-run=server")
        if clients_min > 1:
            with pytest.raises(Refused, match="is too small for aggregation"):
                installed.create(changed(wanted, field, clients_min - 1), "--dry-run=server")


def test_unknown_fields_are_dropped_where_the_caller_is_lax(installed: Kubectl, namespace: str) -> None:
    manifest = changed(fround(namespace), "spec.privcy", {})
    assert "privcy" not in installed.create(manifest, "--dry-run=server", "--validate=ignore")["spec"]


IMMUTABLE = [
    ("spec.privacy.epsilon", "3"),
    ("spec.run", 2),
    ("spec.clients.minAvailable", 1),
    ("spec.evaluation", {"dataset": {"uri": "s3://tributary/datasets/p.jsonl", "digest": DIGEST}}),
    ("spec.clientActiveDeadlineSeconds", 60),
]


@pytest.mark.parametrize(("path", "value"), IMMUTABLE)
def test_a_round_is_immutable(installed: Kubectl, namespace: str, path: str, value: object) -> None:
    installed.apply(fround(namespace, "immutable"))
    with pytest.raises(Refused, match="a round runs once and its spec cannot change"):
        installed.apply(changed(fround(namespace, "immutable"), path, value))


def test_a_round_can_be_suspended_and_its_ttl_changed(installed: Kubectl, namespace: str) -> None:
    installed.apply(fround(namespace, "suspended"))
    installed.apply(changed(fround(namespace, "suspended"), "spec.suspend", True))
    installed.apply(changed(fround(namespace, "suspended"), "spec.ttlSecondsAfterFinished", 5))


@pytest.mark.parametrize(
    ("path", "value"), [("spec.privacy.ledgerUri", "s3://other/ledger/"), ("spec.data.name", "other")]
)
def test_the_ledgers_identity_is_immutable(installed: Kubectl, namespace: str, path: str, value: str) -> None:
    installed.apply(client(namespace, "fixed"))
    with pytest.raises(Refused, match="immutable"):
        installed.apply(changed(client(namespace, "fixed"), path, value))
    installed.apply(changed(client(namespace, "fixed"), "spec.suspend", True))


def test_the_category_shows_all_three_kinds_with_their_columns(installed: Kubectl, namespace: str) -> None:
    for make in MAKERS.values():
        installed.apply(make(namespace, "shown"))
    shown = installed("get", "tributary", "-n", namespace)
    for header in ("SPENT", "CLIENTS", "CANDIDATE"):
        assert header in shown
    for short in ("fclient", "fround", "mrel"):
        assert "shown" in installed("get", short, "-n", namespace)


@pytest.mark.parametrize("kind", ["federatedclient", "federatedround", "modelrelease"])
def test_every_field_of_a_spec_is_explained(installed: Kubectl, kind: str) -> None:
    assert "DESCRIPTION" in installed("explain", kind)
    text = (ROOT / "crds" / f"{kind}s.yaml").read_text()
    schema = yaml.safe_load(text)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for field in schema["properties"]["spec"]["properties"]:
        assert f"FIELD: {field}" in installed("explain", f"{kind}.spec.{field}")


def test_a_release_can_be_scaled(installed: Kubectl, namespace: str) -> None:
    installed.apply(release(namespace, "scaled"))
    installed("scale", "mrel/scaled", "-n", namespace, "--replicas=3")
    assert installed.get("mrel/scaled", "-n", namespace)["spec"]["serving"]["replicas"] == 3

"""The charts as Helm renders them, and as the operator and the contract expect them."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from installation import HUB, OPERATOR_IMAGE, SYSTEM, WORKER_IMAGE, client_values, operator_values, rendered
from kube import CHARTS, Object, Refused, run
from signers import HUB_ENVIRONMENT

from tributary_api.client import WORKER_SERVICE_ACCOUNT
from tributary_api.crdgen import KINDS
from tributary_api.tasks import DATA_MOUNT_PATH, NOISE_KEY_PATH, TASK_ENV
from tributary_operator import kinds, names
from tributary_operator.pods import S3_KEYS, THREADS_ENV
from tributary_operator.settings import Settings

TENANT = "clinic-a"
CHART_VALUES: dict[str, Callable[[], Object]] = {
    "tributary": operator_values,
    "tributary-client": client_values,
}


def find(objects: list[Object], kind: str, name: str, namespace: str | None = None) -> Object:
    """The one object of that kind and name."""
    (found,) = [
        o
        for o in objects
        if (o["kind"], o["metadata"]["name"]) == (kind, name)
        and namespace in {None, o["metadata"].get("namespace")}
    ]
    return found


@pytest.fixture(scope="module")
def operator_chart(helm: Path) -> list[Object]:
    return rendered(helm, "tributary", SYSTEM, operator_values())


@pytest.fixture(scope="module")
def client_chart(helm: Path) -> list[Object]:
    return rendered(helm, "tributary-client", TENANT, client_values())


@pytest.mark.parametrize("chart", CHART_VALUES)
def test_the_chart_lints(helm: Path, chart: str) -> None:
    text = run(
        [str(helm), "lint", "--strict", str(CHARTS / chart), "-f-"], stdin=json.dumps(CHART_VALUES[chart]())
    )
    assert "0 chart(s) failed" in text


def test_the_chart_sets_exactly_the_operators_settings(operator_chart: list[Object]) -> None:
    container = operator_container(operator_chart)
    ours = {e["name"] for e in container["env"] if e["name"].startswith("TRIBUTARY_")}
    assert ours == Settings.environment_names()


def test_the_charts_values_make_valid_settings(operator_chart: list[Object]) -> None:
    container = operator_container(operator_chart)
    environment = {e["name"]: e["value"] for e in container["env"] if "value" in e} | HUB_ENVIRONMENT
    settings = Settings.from_environment(environment)
    assert settings.worker_image == WORKER_IMAGE
    assert settings.hub_job_resources.limits == {"memory": "4Gi"}
    assert settings.store_for_pods.endpoint == "http://s3.example:9000"


def test_the_signing_key_is_one_that_the_operator_takes_and_is_kept(
    helm: Path, operator_chart: list[Object]
) -> None:
    secret = find(operator_chart, "Secret", "tributary-signing-key")
    again = find(rendered(helm, "tributary", SYSTEM, operator_values()), "Secret", "tributary-signing-key")
    (variable,) = [e for e in operator_container(operator_chart)["env"] if e["name"] in HUB_ENVIRONMENT]
    assert variable["valueFrom"]["secretKeyRef"] == {"name": "tributary-signing-key", "key": "key"}
    text = base64.b64decode(secret["data"]["key"]).decode()
    assert Settings.from_environment(
        {"TRIBUTARY_WORKER_IMAGE": WORKER_IMAGE, "TRIBUTARY_BUCKET": "tributary", variable["name"]: text}
    ).signing_key.public.startswith("ed25519:")
    assert secret["data"] != again["data"]
    assert secret["metadata"]["namespace"] == SYSTEM
    assert secret["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_a_signing_key_can_be_brought(helm: Path) -> None:
    values = operator_values(signingKey={"create": False, "secretName": "tributary-mine"})
    objects = rendered(helm, "tributary", SYSTEM, values)
    assert not [o for o in objects if o["kind"] == "Secret" and "signing" in o["metadata"]["name"]]
    (variable,) = [e for e in operator_container(objects)["env"] if e["name"] in HUB_ENVIRONMENT]
    assert variable["valueFrom"]["secretKeyRef"]["name"] == "tributary-mine"


def test_tuning_defaults_are_those_of_the_settings(operator_chart: list[Object]) -> None:
    """Two places state them: the chart, and the settings for who runs the operator by hand."""
    defaults = {
        f"TRIBUTARY_{name.upper()}": field.default
        for name, field in Settings.model_fields.items()
        if isinstance(field.default, int)
    }
    chart = {
        e["name"]: int(e["value"]) for e in operator_container(operator_chart)["env"] if e["name"] in defaults
    }
    assert chart == defaults


def operator_container(objects: list[Object]) -> Any:
    return find(objects, "Deployment", "tributary-operator")["spec"]["template"]["spec"]["containers"][0]


def test_the_operators_pod_is_restricted_and_probed(operator_chart: list[Object]) -> None:
    deployment = find(operator_chart, "Deployment", "tributary-operator")["spec"]
    pod, container = deployment["template"]["spec"], operator_container(operator_chart)
    assert deployment["replicas"] == 2
    assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
    assert container["image"] == OPERATOR_IMAGE
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()


def test_crds_are_kept_on_uninstall(operator_chart: list[Object]) -> None:
    crds = [o for o in operator_chart if o["kind"] == "CustomResourceDefinition"]
    assert len(crds) == len(KINDS)
    assert all(o["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep" for o in crds)


def rules(objects: list[Object], kind: str, name: str, namespace: str | None = None) -> set[tuple[str, str]]:
    """What a role allows, as (group/resource, verb)."""
    return {
        (f"{group}/{resource}", verb)
        for rule in find(objects, kind, name, namespace)["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def test_outside_its_namespaces_the_operator_sees_and_reports_only(operator_chart: list[Object]) -> None:
    assert rules(operator_chart, "ClusterRole", "tributary-operator") == {
        *((f"tributary.dev/{kind.plural}", verb) for kind in kinds.OURS for verb in ("get", "list", "watch")),
        *((f"tributary.dev/{kind.plural}/status", verb) for kind in kinds.OURS for verb in ("get", "patch")),
        *((f"tributary.dev/{kind.plural}", "patch") for kind in (kinds.ROUND, kinds.RELEASE)),
    }


def test_in_its_own_namespace_the_operator_has_one_lease_and_nothing_else(
    operator_chart: list[Object],
) -> None:
    role = find(operator_chart, "Role", "tributary-operator-lease", SYSTEM)
    (rule,) = role["rules"]
    assert rule["resourceNames"] == [names.LEASE]
    assert rules(operator_chart, "Role", "tributary-operator-lease", SYSTEM) == {
        (resource_of(kinds.LEASE), verb) for verb in ("get", "create", "update")
    }
    bound = find(operator_chart, "RoleBinding", "tributary-operator-lease", SYSTEM)
    deployed = find(operator_chart, "ServiceAccount", bound["subjects"][0]["name"])
    assert deployed["metadata"]["namespace"] == SYSTEM


def test_one_replica_alone_can_be_drained(helm: Path, operator_chart: list[Object]) -> None:
    budget = find(operator_chart, "PodDisruptionBudget", "tributary-operator", SYSTEM)
    assert budget["spec"]["maxUnavailable"] == 1
    single = rendered(helm, "tributary", SYSTEM, operator_values(replicas=1))
    assert not [o for o in single if o["kind"] == "PodDisruptionBudget"]


FORBIDDEN = {
    "/secrets",
    "/pods/exec",
    "/pods/log",
    "/pods/attach",
    "/pods/ephemeralcontainers",
    "/configmaps",
}


def test_no_role_of_the_operator_reaches_secrets_pods_or_wildcards(
    operator_chart: list[Object], client_chart: list[Object]
) -> None:
    everywhere = {
        *rules(operator_chart, "ClusterRole", "tributary-operator"),
        *rules(operator_chart, "Role", "tributary-operator", HUB),
        *rules(client_chart, "Role", "tributary-operator-notes", TENANT),
    }
    assert not {resource for resource, _ in everywhere} & FORBIDDEN
    assert not [pair for pair in everywhere if "*" in "".join(pair)]
    assert {verb for resource, verb in everywhere if resource == "/pods"} == {"get", "list"}


def test_the_roles_cover_the_kinds_that_the_operator_makes(
    operator_chart: list[Object], client_chart: list[Object]
) -> None:
    hub = rules(operator_chart, "Role", "tributary-operator", HUB)
    tenant = rules(client_chart, "Role", "tributary-operator-notes", TENANT)
    for kind in kinds.CHILDREN:
        # A Job is created once and never changed; everything else is applied.
        needed = {"create", "list", "delete", "watch" if kind == kinds.JOB else "patch"}
        assert needed <= {verb for resource, verb in hub if resource == resource_of(kind)}
        if kind in {kinds.JOB, kinds.SERVICE}:
            assert needed <= {verb for resource, verb in tenant if resource == resource_of(kind)}
    assert (resource_of(kinds.EVENT), "create") in hub & tenant
    assert (resource_of(kinds.NAMESPACE), "get") in tenant


def resource_of(kind: kinds.Kind) -> str:
    group = kind.api_version.rpartition("/")[0]
    return f"{group}/{kind.plural}"


def test_creating_a_round_is_not_in_view(operator_chart: list[Object]) -> None:
    assert {verb for _, verb in rules(operator_chart, "ClusterRole", "tributary-view")} == {
        "get",
        "list",
        "watch",
    }
    assert ("tributary.dev/federatedrounds", "create") in rules(
        operator_chart, "ClusterRole", "tributary-edit"
    )
    assert rules(operator_chart, "ClusterRole", "tributary-admin") == {
        ("tributary.dev/federatedclients", "use")
    }


def test_the_client_chart_agrees_with_the_contract(client_chart: list[Object]) -> None:
    find(client_chart, "ServiceAccount", WORKER_SERVICE_ACCOUNT)
    policy = find(client_chart, "NetworkPolicy", "tributary-train")
    assert policy["spec"]["podSelector"]["matchLabels"] == {names.STAGE: names.TRAIN}
    client = find(client_chart, "FederatedClient", "notes")
    assert client["spec"] == client_values()["client"]["spec"]
    assert client["metadata"]["labels"]["role"] == "owner"


def test_admission_looks_for_the_operators_labels(operator_chart: list[Object]) -> None:
    text = json.dumps(find(operator_chart, "ValidatingAdmissionPolicy", "tributary-tenant-jobs"))
    assert names.CLIENT in text
    assert names.STAGE in text


@pytest.mark.parametrize(
    ("policy", "more"),
    [("tributary-tenant-jobs", {f"DATA_{key}" for key in S3_KEYS}), ("tributary-hub-pods", set())],
)
def test_admission_allows_the_variables_that_pods_get_and_no_other(
    operator_chart: list[Object], policy: str, more: set[str]
) -> None:
    text = json.dumps(find(operator_chart, "ValidatingAdmissionPolicy", policy))
    (allowed,) = set(re.findall(r"e\.name in \[(.*?)\]", text))
    assert set(re.findall(r"'(\w+)'", allowed)) == {TASK_ENV, THREADS_ENV, *S3_KEYS, *more}


def test_admission_knows_where_the_builders_mount(operator_chart: list[Object]) -> None:
    policy = find(operator_chart, "ValidatingAdmissionPolicy", "tributary-tenant-jobs")
    (rule,) = [v["expression"] for v in policy["spec"]["validations"] if "mountPath" in v["expression"]]
    paths = {"/tmp", "/dev/shm", str(Path(NOISE_KEY_PATH).parent), DATA_MOUNT_PATH}
    assert set(re.findall(r"'(/.*?)'", rule)) == paths


def test_the_noise_key_is_32_random_bytes_and_kept(helm: Path, client_chart: list[Object]) -> None:
    secret = find(client_chart, "Secret", "tributary-noise-key")
    again = find(rendered(helm, "tributary-client", TENANT, client_values()), "Secret", "tributary-noise-key")
    assert len(base64.b64decode(secret["data"]["key"])) == 32
    assert secret["data"] != again["data"]
    assert secret["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


@pytest.mark.parametrize("has_own_key", [True, False])
def test_a_second_client_of_a_namespace_brings_only_its_own_objects(
    helm: Path, client_chart: list[Object], has_own_key: bool
) -> None:
    """With the values that the chart's comments name: one object belongs to one Helm release."""
    values = client_values(
        "letters", sharedObjects={"create": False}, noiseKey={"create": has_own_key}, credentials={}
    )
    if has_own_key:
        values["client"]["spec"]["privacy"]["noiseKeySecret"] = "tributary-letters-key"
    second = rendered(helm, "tributary-client", TENANT, values)
    assert not {identity(o) for o in second} & {identity(o) for o in client_chart}


@pytest.mark.parametrize("value", ["sharedObjects", "noiseKey"])
def test_both_values_say_what_a_second_client_needs(value: str) -> None:
    schema = json.loads((CHARTS / "tributary-client" / "values.schema.json").read_text())
    description = schema["properties"][value]["description"]
    assert {"sharedObjects.create=false", "noiseKey.create=false"} <= set(
        re.findall(r"[\w.]+=\w+", description)
    )


def identity(manifest: Object) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]


def test_everything_of_a_tenant_lies_in_its_namespace(client_chart: list[Object]) -> None:
    """So that deleting the namespace, with the operator gone, leaves nothing."""
    assert {o["metadata"].get("namespace") for o in client_chart} == {TENANT}
    assert not [o for o in client_chart if o["metadata"].get("finalizers")]


BAD: list[tuple[str, str, object, str]] = [
    ("tributary", "image", "operator:latest", "/image': 'operator:latest' does not match pattern"),
    ("tributary", "workerImage", "", "/workerImage': '' does not match pattern"),
    ("tributary", "store.bucket", "", "/store/bucket': '' does not match pattern"),
    ("tributary", "store.buket", "x", "additional properties 'buket' not allowed"),
    ("tributary", "hubNamespaces", [], "/hubNamespaces': minItems"),
    ("tributary", "tuning.pollSeconds", 0, "/tuning/pollSeconds': minimum"),
    ("tributary-client", "client.name", "", "/client/name': '' does not match pattern"),
    ("tributary-client", "client.spec.privacy.budget.epsilon", 8, "got number, want string"),
    ("tributary-client", "client.spec.privacy.budget.epsilon", "-8", "does not match pattern"),
    ("tributary-client", "client.spec.worker.allowedImages", ["worker:v1"], "does not match pattern"),
    ("tributary-client", "client.spec.consent.hub", "x", "additional properties 'hub' not allowed"),
    ("tributary-client", "client.spec.data.numExamples", "many", "got string, want integer"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda b: f"{b[1]}={b[2]}")
def test_bad_values_are_refused_with_their_place(helm: Path, bad: tuple[str, str, object, str]) -> None:
    chart, path, value, message = bad
    values: Any = CHART_VALUES[chart]()
    *parents, last = path.split(".")
    place = values
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = value
    with pytest.raises(Refused) as refused:
        run([str(helm), "lint", str(CHARTS / chart), "-f-"], stdin=json.dumps(values))
    assert message in str(refused.value)


def test_every_value_has_a_schema() -> None:
    """A misspelt value is an error, so every default of values.yaml must be known."""
    for chart in CHART_VALUES:
        values = yaml.safe_load((CHARTS / chart / "values.yaml").read_text())
        schema = json.loads((CHARTS / chart / "values.schema.json").read_text())
        assert values.keys() | {"global"} == schema["properties"].keys()

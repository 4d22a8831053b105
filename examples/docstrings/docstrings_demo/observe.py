"""One look at the cluster: our objects, the pods that work for them, and how far these are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from docstrings_demo.kube import Kube, Object
from tributary_api.client import FederatedClient
from tributary_api.meta import Condition
from tributary_api.release import ModelRelease
from tributary_api.round import FederatedRound
from tributary_operator import names

POD_INDEX = "batch.kubernetes.io/job-completion-index"


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod that the operator started."""

    namespace: str
    name: str
    stage: str
    run_key: str
    client: str
    index: int
    phase: str
    step: int = 0
    """Steps done, from the worker's own log: public numbers only."""
    steps: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """The load generator's counters."""

    sent: int = 0
    failed: int = 0
    per_release: tuple[tuple[str, int], ...] = ()
    errors: tuple[str, ...] = ()
    p50_seconds: float = 0.0
    p99_seconds: float = 0.0
    final: bool = False


@dataclass(frozen=True, slots=True)
class Seen:
    clients: Sequence[FederatedClient]
    rounds: Sequence[FederatedRound]
    releases: Sequence[ModelRelease]
    pods: Sequence[Pod]
    load: Load | None = None

    def round(self, name: str) -> FederatedRound | None:
        return next((r for r in self.rounds if r.metadata.name == name), None)

    def release(self, name: str) -> ModelRelease | None:
        return next((r for r in self.releases if r.metadata.name == name), None)

    def training_pods(self, run_key: str, namespace: str) -> list[Pod]:
        return [
            pod
            for pod in self.pods
            if (pod.stage, pod.run_key, pod.namespace) == (names.TRAIN, run_key, namespace)
        ]


def observe(kube: Kube, load_job: tuple[str, str] | None = None) -> Seen:
    """Everything at once. `load_job` is the namespace and name of the load generator's Job, if it runs."""
    pods = [
        pod_of(item) for item in kube.items("pods", labels=f"{names.MANAGED_BY}={names.MANAGED_BY_VALUE}")
    ]
    return Seen(
        clients=[FederatedClient.model_validate(o) for o in kube.items(FederatedClient.PLURAL)],
        rounds=[FederatedRound.model_validate(o) for o in kube.items(FederatedRound.PLURAL)],
        releases=[ModelRelease.model_validate(o) for o in kube.items(ModelRelease.PLURAL)],
        pods=[with_progress(kube, pod) for pod in pods],
        load=load_counters(kube, *load_job) if load_job else None,
    )


def pod_of(item: Object) -> Pod:
    labels = item["metadata"].get("labels", {})
    return Pod(
        namespace=item["metadata"]["namespace"],
        name=item["metadata"]["name"],
        stage=labels.get(names.STAGE, ""),
        run_key=labels.get(names.RUN_KEY, ""),
        client=labels.get(names.CLIENT, ""),
        index=int(labels.get(POD_INDEX, "0")),
        phase=item.get("status", {}).get("phase", "Unknown"),
    )


def with_progress(kube: Kube, pod: Pod) -> Pod:
    if pod.stage != names.TRAIN or pod.phase != "Running" or pod.index != 0:
        return pod
    for line in json_lines(reversed(kube.log(pod.namespace, pod.name, tail_lines=20))):
        if "step" in line and "steps" in line:
            return replace(pod, step=int(line["step"]), steps=int(line["steps"]))
    return pod


def load_counters(kube: Kube, namespace: str, job: str) -> Load | None:
    for pod in kube.items("pods", namespace, labels=f"{names.JOB_NAME}={job}"):
        for line in json_lines(reversed(kube.log(namespace, pod["metadata"]["name"], tail_lines=5))):
            return load_of(line)
    return None


def load_of(line: dict[str, Any]) -> Load:
    return Load(
        sent=line["sent"],
        failed=line["failed"],
        per_release=tuple(sorted(line["per_release"].items())),
        errors=tuple(line["errors"]),
        p50_seconds=line["p50_seconds"],
        p99_seconds=line["p99_seconds"],
        final=line["final"],
    )


def json_lines(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    """The lines that are JSON objects; logs hold others, too."""
    for line in lines:
        try:
            decoded = json.loads(line)
        except ValueError:
            continue
        if isinstance(decoded, dict):
            yield decoded


def condition(conditions: Sequence[Condition], kind: str) -> Condition | None:
    return next((c for c in conditions if c.type == kind), None)


def is_true(conditions: Sequence[Condition], kind: str) -> bool:
    found = condition(conditions, kind)
    return found is not None and found.status == "True"

"""The kinds of objects the operator touches, and their paths in the API."""

from __future__ import annotations

from dataclasses import dataclass

from tributary_api.base import API_VERSION
from tributary_api.client import FederatedClient
from tributary_api.release import ModelRelease
from tributary_api.round import FederatedRound


@dataclass(frozen=True, slots=True)
class Kind:
    api_version: str
    kind: str
    plural: str

    def path(
        self, namespace: str | None = None, name: str | None = None, subresource: str | None = None
    ) -> str:
        root = "/apis/" if "/" in self.api_version else "/api/"
        parts = [f"{root}{self.api_version}"]
        if namespace is not None:
            parts.append(f"namespaces/{namespace}")
        parts += [part for part in (self.plural, name, subresource) if part is not None]
        return "/".join(parts)


JOB = Kind("batch/v1", "Job", "jobs")
POD = Kind("v1", "Pod", "pods")
SERVICE = Kind("v1", "Service", "services")
NAMESPACE = Kind("v1", "Namespace", "namespaces")
EVENT = Kind("events.k8s.io/v1", "Event", "events")
DEPLOYMENT = Kind("apps/v1", "Deployment", "deployments")
LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")
DISRUPTION_BUDGET = Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")

CLIENT = Kind(API_VERSION, FederatedClient.KIND, FederatedClient.PLURAL)
ROUND = Kind(API_VERSION, FederatedRound.KIND, FederatedRound.PLURAL)
RELEASE = Kind(API_VERSION, ModelRelease.KIND, ModelRelease.PLURAL)

OURS = (CLIENT, ROUND, RELEASE)
CHILDREN = (JOB, SERVICE, DEPLOYMENT, DISRUPTION_BUDGET)
BY_NAME = {kind.kind: kind for kind in (*OURS, *CHILDREN, POD, NAMESPACE)}

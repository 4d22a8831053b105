"""What cluster and object store looked like when we looked at a release."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tributary_api.records import CompressionManifest, GateVerdict
from tributary_api.release import Revision
from tributary_api.shared import ModelRef
from tributary_operator.decision import Delete
from tributary_operator.kinds import DEPLOYMENT, SERVICE
from tributary_operator.rounds.observed import NO_ATTEMPTS, Attempts


@dataclass(frozen=True, slots=True)
class Source:
    """The model that the spec names, or why there is none (yet)."""

    model: ModelRef | None = None
    weight_bytes: int = 0
    reason: str = ""
    message: str = ""
    is_stalled: bool = False


@dataclass(frozen=True, slots=True)
class ObservedRevision:
    """The Deployment of one revision."""

    record: Revision
    namespace: str
    name: str
    uid: str
    replicas: int
    """Pods that it shall have."""
    ready: int
    is_settled: bool
    """Its status is about its present spec, and no pod of an older template is left."""
    problem: str = ""
    """Why Kubernetes has given up on it; empty if it has not."""

    @property
    def is_fully_available(self) -> bool:
        return self.is_settled and self.replicas >= 1 and self.ready >= self.replicas

    @property
    def deletion(self) -> Delete:
        return Delete(DEPLOYMENT, self.namespace, self.name, self.uid)


@dataclass(frozen=True, slots=True)
class ObservedService:
    namespace: str
    name: str
    uid: str
    revision: str
    """That it selects."""
    port: int
    is_ours: bool = True
    """It belongs to this release; another's is left alone."""

    @property
    def deletion(self) -> Delete:
        return Delete(SERVICE, self.namespace, self.name, self.uid)


@dataclass(frozen=True, slots=True)
class ObservedRelease:
    source: Source
    compression: CompressionManifest | None = None
    """Of the model that the spec names."""
    compressing: Attempts = NO_ATTEMPTS
    verdict: GateVerdict | None = None
    """About the candidate and the present stable model."""
    gating: Attempts = NO_ATTEMPTS
    revisions: Mapping[str, ObservedRevision] = field(default_factory=dict[str, ObservedRevision])
    service: ObservedService | None = None
    """The Service that spec.serving names."""
    other_services: tuple[ObservedService, ...] = ()
    """Services of this release under earlier names."""
    has_disruption_budget: bool = False

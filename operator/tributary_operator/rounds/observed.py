"""What cluster, object store and ledgers looked like when we looked at a round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tributary_api.client import FederatedClient
from tributary_api.meta import NamespacedName
from tributary_api.records import (
    AggregateManifest,
    DeltaManifest,
    EvaluationReport,
    ProgressMark,
    RoundOutcome,
    RoundPlan,
)
from tributary_api.round import ClientFailure
from tributary_api.shared import ModelRef
from tributary_operator.decision import Delete
from tributary_operator.jobs import Denied, JobState, ObservedJob


@dataclass(frozen=True, slots=True)
class WorkerFailure:
    """Why an attempt failed."""

    reason: str
    message: str
    is_retryable: bool


@dataclass(frozen=True, slots=True)
class Attempts:
    """All Jobs of one client, or of one stage in the hub."""

    jobs: tuple[ObservedJob, ...] = ()
    last_failure: WorkerFailure | None = None

    @property
    def active(self) -> ObservedJob | None:
        return next((job for job in self.jobs if job.is_active), None)

    @property
    def latest_ended(self) -> ObservedJob | None:
        ended = [job for job in self.jobs if not job.is_active]
        return max(ended, key=lambda job: job.attempt, default=None)

    @property
    def failed(self) -> int:
        """Asked only while the Job's result is missing: then one that succeeded counts as failed, too."""
        return sum(not job.is_active for job in self.jobs)

    @property
    def following(self) -> int:
        """Number of the next attempt."""
        return max((job.attempt for job in self.jobs), default=-1) + 1

    @property
    def deletions(self) -> tuple[Delete, ...]:
        """Of what still runs and is not being stopped already."""
        stoppable = {JobState.PENDING, JobState.RUNNING}
        return tuple(job.deletion for job in self.jobs if job.state in stoppable)

    def is_exhausted(self, backoff_limit: int) -> bool:
        """Nothing runs, and no further attempt can help or is allowed."""
        if self.active is not None or self.last_failure is None:
            return False
        return not self.last_failure.is_retryable or self.failed > backoff_limit


NO_ATTEMPTS = Attempts()


@dataclass(frozen=True, slots=True)
class Candidate:
    """A selected client before the plan."""

    client: FederatedClient
    access_problem: str = ""
    """Why its Jobs cannot be read; empty if they can."""
    data_overlaps: str = ""
    """Older client of its namespace whose data overlap, as namespace/name; empty if there is none."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The model to start from, or why there is none (yet)."""

    ref: ModelRef | None = None
    reason: str = ""
    message: str = ""
    is_stalled: bool = False


@dataclass(frozen=True, slots=True)
class Selection:
    """What a plan is made from."""

    base_model: BaseModel
    candidates: tuple[Candidate, ...] = ()
    sigmas: Mapping[int, float] = field(default_factory=dict[int, float])
    """σ by rounded N, as far as they are solved for."""
    unsolvable: Mapping[int, str] = field(default_factory=dict[int, str])
    """Why there is no σ, by rounded N."""
    budget_problems: Mapping[NamespacedName, ClientFailure] | None = None
    """Clients whose ledger does not allow the round, once all ledgers have been asked; None before."""


@dataclass(frozen=True, slots=True)
class ObservedRound:
    """A round's world, already sorted into the buckets that decisions ask about."""

    outcome: RoundOutcome | None = None
    plan: RoundPlan | None = None
    selection: Selection | None = None
    """Only while there is neither plan nor outcome."""
    clients: Mapping[NamespacedName, FederatedClient] = field(
        default_factory=dict[NamespacedName, FederatedClient]
    )
    """Members of the cohort as they are now; a deleted one is absent."""
    reserved: frozenset[NamespacedName] = frozenset()
    refused: Mapping[NamespacedName, ClientFailure] = field(
        default_factory=dict[NamespacedName, ClientFailure]
    )
    """Clients whose reservation, Job or delta was refused, for good."""
    denied: Mapping[str, Denied] = field(default_factory=dict[str, Denied])
    """Namespaces whose Jobs we may not read at present; that may pass."""
    training: Mapping[NamespacedName, Attempts] = field(default_factory=dict[NamespacedName, Attempts])
    deltas: Mapping[NamespacedName, DeltaManifest] = field(
        default_factory=dict[NamespacedName, DeltaManifest]
    )
    """Deltas that were delivered under the grant."""
    aggregate: AggregateManifest | None = None
    progress: tuple[ProgressMark, ...] = ()
    """The newest of each pod that aggregates."""
    aggregation: Attempts = NO_ATTEMPTS
    report: EvaluationReport | None = None
    evaluation: Attempts = NO_ATTEMPTS
    trained_weights: int | None = None
    """How many weights the method trains, where the architecture tells."""
    affordable_rounds: int | None = None
    """How many such rounds the tightest budget holds; asked before the cost is announced."""
    is_announced: bool = False
    """The status shows what privacy will cost."""
    closed: frozenset[NamespacedName] = frozenset()
    """Members whose ledger entry is settled or released."""

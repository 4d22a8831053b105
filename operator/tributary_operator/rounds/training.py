"""Where each client of the cohort stands, and what the round does about it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import Enum

from tributary_api.meta import NamespacedName
from tributary_api.records import PlannedClient
from tributary_api.round import ClientFailure
from tributary_operator.decision import POLL_AFTER, Apply, Delete, Done, Failed, Outcome, Waiting
from tributary_operator.jobs import JobState
from tributary_operator.rounds import children
from tributary_operator.rounds.eligibility import failure, no_access, withdrawal
from tributary_operator.rounds.observed import NO_ATTEMPTS, ObservedRound
from tributary_operator.rounds.situation import Situation

LAUNCH_PERIOD = timedelta(seconds=1)
ACCESS_LOST_AFTER = timedelta(minutes=5)
"""A refusal can come from an API server that is still starting; one that lasts is the owner's will."""


class Standing(Enum):
    DELIVERED = "delivered"
    RUNNING = "running"
    PENDING = "pending"
    """Its Job exists, but no pod is ready."""
    UNSEEN = "unseen"
    """Its Jobs cannot be read at present, so nobody knows whether one runs."""
    TO_START = "to start"
    FAILED = "failed"


IN_PROGRESS = frozenset({Standing.RUNNING, Standing.PENDING, Standing.UNSEEN, Standing.TO_START})


@dataclass(frozen=True, slots=True)
class Member:
    """One client of the cohort, now."""

    planned: PlannedClient
    standing: Standing
    failure: ClientFailure | None = None


def members(s: Situation) -> list[Member]:
    return [_member(s, planned) for planned in s.plan.cohort]


def _member(s: Situation, planned: PlannedClient) -> Member:
    if planned.client in s.seen.deltas:
        return Member(planned, Standing.DELIVERED)
    if (
        refused := s.seen.refused.get(planned.client)
        or _gone(s, planned.client)
        or _shut_out(s, planned.client)
    ):
        return Member(planned, Standing.FAILED, refused)
    attempts = s.seen.training.get(planned.client, NO_ATTEMPTS)
    if active := attempts.active:
        running = active.state is JobState.RUNNING
        return Member(planned, Standing.RUNNING if running else Standing.PENDING)
    if planned.client.namespace in s.seen.denied:
        return Member(planned, Standing.UNSEEN)
    if attempts.last_failure and attempts.is_exhausted(s.fedround.spec.client_backoff_limit):
        last = attempts.last_failure
        return Member(planned, Standing.FAILED, failure(planned.client, last.reason, last.message))
    return Member(planned, Standing.TO_START)


def has_moved_on(seen: ObservedRound) -> bool:
    """Aggregation has begun: a Job that somebody removes now must not bring its client back."""
    return seen.aggregate is not None or bool(seen.aggregation.jobs)


def _gone(s: Situation, client: NamespacedName) -> ClientFailure | None:
    current = s.seen.clients.get(client)
    if current is None:
        return failure(client, "ClientDeleted", "the FederatedClient does not exist any more")
    return withdrawal(current, s.fedround.metadata.namespace, s.now)


def _shut_out(s: Situation, client: NamespacedName) -> ClientFailure | None:
    denied = s.seen.denied.get(client.namespace)
    if denied is None or s.now - denied.since < ACCESS_LOST_AFTER:
        return None
    return failure(client, "NoAccess", no_access(client, str(denied.error)))


def train_clients(s: Situation) -> Outcome:
    """Done when nobody can deliver any more and the quorum has; Failed when the quorum is out of reach."""
    if has_moved_on(s.seen):
        return Done()
    cohort, needed = members(s), s.plan.quorum
    count = Counter(member.standing for member in cohort)
    delivered, in_progress = count[Standing.DELIVERED], sum(count[standing] for standing in IN_PROGRESS)
    if s.now >= s.run.deadline:
        if delivered >= needed:
            return Done()
        return Failed("DeadlineExceeded", f"{delivered} of {needed} needed clients delivered in time")
    if delivered + in_progress < needed:
        return Failed("QuorumLost", f"{delivered} delivered of {needed} needed; {_reasons(cohort)}")
    if in_progress == 0:
        return Done()
    return _waiting(s, cohort)


def _waiting(s: Situation, cohort: Sequence[Member]) -> Waiting:
    to_start = [m.planned for m in cohort if m.standing is Standing.TO_START]
    rate = s.fedround.spec.clients.launch_rate_per_second
    delivered = sum(m.standing is Standing.DELIVERED for m in cohort)
    return Waiting(
        reason="Training",
        message=f"{delivered} of {len(cohort)} clients have delivered, {s.plan.quorum} needed",
        apply=(*_launches(s, to_start[:rate]), *_meeting_points(s, cohort)),
        delete=stops(s.seen, [m.planned.client for m in cohort if m.standing is Standing.FAILED]),
        poll_after=LAUNCH_PERIOD if len(to_start) > rate else min(POLL_AFTER, s.run.deadline - s.now),
    )


def _launches(s: Situation, to_start: Sequence[PlannedClient]) -> list[Apply]:
    """The next attempt of each; a gang's Service first, so that no pod looks for a name that is not there."""
    launches: list[Apply] = []
    for planned in to_start:
        attempt = s.seen.training.get(planned.client, NO_ATTEMPTS).following
        if planned.nodes > 1:
            launches.append(children.rendezvous_service(s.run, planned, attempt=attempt, job_uid=None))
        launches.append(children.train_job(s.run, planned, s.seen.clients[planned.client], attempt))
    return launches


def _meeting_points(s: Situation, cohort: Sequence[Member]) -> list[Apply]:
    """Services of gangs that are still starting, now owned by their Jobs."""
    gangs = [m.planned for m in cohort if m.standing is Standing.PENDING and m.planned.nodes > 1]
    jobs = [(planned, s.seen.training[planned.client].active) for planned in gangs]
    return [
        children.rendezvous_service(s.run, planned, attempt=job.attempt, job_uid=job.uid)
        for planned, job in jobs
        if job is not None and job.state is not JobState.STOPPING
    ]


def stops(seen: ObservedRound, clients: Sequence[NamespacedName]) -> tuple[Delete, ...]:
    """Deletions of what still runs for these clients, where we may."""
    open_ = (client for client in clients if client.namespace not in seen.denied)
    attempts = (seen.training.get(client, NO_ATTEMPTS) for client in open_)
    return tuple(deletion for attempt in attempts for deletion in attempt.deletions)


def stop_all(seen: ObservedRound) -> tuple[Delete, ...]:
    """Deletions of whatever runs for the round, beside data and in the hub."""
    hub = (*seen.aggregation.deletions, *seen.evaluation.deletions)
    return (*stops(seen, list(seen.training)), *hub)


def _reasons(cohort: Sequence[Member]) -> str:
    failed: Mapping[str, int] = Counter(m.failure.reason for m in cohort if m.failure is not None)
    return ", ".join(f"{count} {reason}" for reason, count in sorted(failed.items())) or "nobody failed"

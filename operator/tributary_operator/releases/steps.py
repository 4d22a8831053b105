"""The steps of a release. Each looks at what exists and says what is missing."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from tributary_api.release import RejectedRevision
from tributary_operator.decision import AT_ONCE, Done, Failed, Outcome, Waiting
from tributary_operator.releases import children, identity
from tributary_operator.releases.measures import measured
from tributary_operator.releases.observed import ObservedRevision
from tributary_operator.releases.situation import Situation
from tributary_operator.rounds.observed import Attempts

LOOK_AGAIN = timedelta(seconds=2)
"""Deployments have no watch of ours; while one starts or is watched, it is looked at this often."""
MESSAGE_LENGTH_MAX = 1000


@dataclass(frozen=True, slots=True)
class Intend(Waiting):
    """A switch to record in the status, before anything is changed."""

    to_revision: str = ""
    rejected: RejectedRevision | None = None
    """The revision that is switched away from, because it turned out badly."""


def finish_switch(s: Situation) -> Outcome:
    """An intended switch is carried out as soon as what it leads to can answer."""
    intended = s.transition
    if intended is None or intended.switched_at is not None:
        return Done()
    goal = intended.to_revision
    if not s.is_wanted(goal) or not s.is_available(goal):
        return Done()
    service = s.seen.service
    if service is None:
        apply = children.service(s.release, goal)
        return Waiting("Promoting", f"opening the Service for {goal}", apply=(apply,), poll_after=AT_ONCE)
    if not service.is_ours:
        return _service_is_taken(s)
    patch = children.switch(s.release, service.revision, goal)
    message = f"switching the Service from {service.revision} to {goal}"
    return Waiting("Promoting", message, apply=(patch,), poll_after=AT_ONCE)


def keep_service(s: Situation) -> Outcome:
    """The Service is there and selects the stable revision, whoever touched or renamed it."""
    service, stable = s.seen.service, s.stable
    if not stable or not s.is_available(stable):
        return Done()
    if service is None:
        apply = children.service(s.release, stable)
        return Waiting("RestoringService", f"making the Service again for {stable}", apply=(apply,))
    if not service.is_ours:
        return _service_is_taken(s)
    if service.revision != stable:
        patch = children.switch(s.release, service.revision, stable)
        return Waiting("RestoringService", f"switching the Service back to {stable}", apply=(patch,))
    if service.port != s.release.spec.serving.port:
        patch = children.change_port(s.release, stable)
        return Waiting("RestoringService", "changing the port of the Service", apply=(patch,))
    return Done()


def _service_is_taken(s: Situation) -> Waiting:
    name = s.release.spec.serving.service_name
    message = f"the Service {name} belongs to something else: delete it, or change spec.serving.serviceName"
    return Waiting("ServiceTaken", message, stalled=True)


def watch_stable(s: Situation) -> Outcome:
    """For some time after a switch the way back is one write; it is taken when pods are lost."""
    if not s.is_watching or s.transition is None or s.watched_until is None:
        return Done()
    before = s.transition.from_revision
    if s.is_available(s.stable) or not s.is_kept(before) or not s.is_available(before):
        remaining = s.watched_until - s.now
        message = f"watching {s.stable} until {s.watched_until:%H:%M:%S}"
        return Waiting("Watching", message, poll_after=min(LOOK_AGAIN, remaining))
    found = s.seen.revisions.get(s.stable)
    pods = f"{found.ready} of {found.replicas} pods are ready" if found is not None else "its pods are gone"
    message = f"{s.stable} did not stay available after the switch ({pods}); going back to {before}"
    rejected = RejectedRevision(
        revision=s.stable, stable=before, reason="AnalysisFailed", message=message[:MESSAGE_LENGTH_MAX]
    )
    return Intend("RollingBack", message, poll_after=AT_ONCE, to_revision=before, rejected=rejected)


def resolve_model(s: Situation) -> Outcome:
    source = s.seen.source
    if source.model is not None:
        return Done()
    # A round that completes tells nobody but its own daemon; the outcome is looked for.
    poll_after = timedelta(seconds=s.settings.poll_seconds)
    return Waiting(source.reason, source.message, poll_after=poll_after, stalled=source.is_stalled)


def go_back(s: Situation) -> Outcome:
    """A revision that served before and is still warm needs neither compression, gate nor pods."""
    promoted = s.strategy.promoted_revision
    is_named = s.strategy.promotion == "Manual" and s.is_kept(promoted)
    goal = promoted if is_named else s.target
    if not s.is_kept(goal) or (goal == s.target and s.rejection is not None):
        return Done()
    if not is_named and s.strategy.promotion == "Manual":
        return Done()  # waits for its promotion, like every candidate
    if not s.is_available(goal):
        return Waiting(
            "CandidateStarting", f"{goal} is kept, but not all its pods are ready", poll_after=LOOK_AGAIN
        )
    return Intend(
        "Promoting", f"going back to {goal}, which is still warm", poll_after=AT_ONCE, to_revision=goal
    )


def heed_rejection(s: Situation) -> Outcome:
    if s.target == s.stable or s.rejection is None:
        return Done()
    return Waiting(s.rejection.reason, s.rejection.message, stalled=True)


def compress_model(s: Situation) -> Outcome:
    parent = s.seen.source.model
    if s.target == s.stable or s.is_kept(s.target) or s.candidate_model is not None or parent is None:
        return Done()
    if failed := _exhausted(s.seen.compressing, s):
        return failed
    key = identity.compression_key(s.release, parent, s.settings)
    attempt = s.seen.compressing.following
    job = children.compress_job(s.release, parent, key, attempt=attempt, settings=s.settings)
    steps = ", ".join(step_name for step in s.release.spec.compression for step_name in step.to_json_object())
    return Waiting(
        "Compressing", f"{steps} of {parent.uri}", apply=() if s.seen.compressing.active else (job,)
    )


def pass_gate(s: Situation) -> Outcome:
    """The verdict about this candidate and the present stable model; only PASS goes on."""
    candidate = s.candidate
    if candidate is None or s.is_kept(s.target):
        return Done()
    verdict = s.seen.verdict
    if verdict is not None:
        return Done() if verdict.verdict == "PASS" else Failed(verdict.reason, verdict.message)
    if failed := _exhausted(s.seen.gating, s):
        return failed
    rivals = s.rivals
    key = identity.gate_key(s.release, candidate.model, candidate.parent, rivals, s.settings)
    attempt = s.seen.gating.following
    job = children.gate_job(s.release, candidate, rivals, key, attempt=attempt, settings=s.settings)
    against = "its parent" if rivals.stable is None else "its parent and the model in service"
    message = f"comparing {candidate.revision} with {against}"
    return Waiting("Gating", message, apply=() if s.seen.gating.active else (job,))


def _exhausted(attempts: Attempts, s: Situation) -> Failed | None:
    if attempts.last_failure is None or not attempts.is_exhausted(s.settings.hub_job_backoff_limit):
        return None
    return Failed(attempts.last_failure.reason, attempts.last_failure.message)


def start_candidate(s: Situation) -> Outcome:
    """All pods of the candidate answer before anybody is sent to them."""
    candidate = s.candidate
    if candidate is None:
        return Done()
    found = s.seen.revisions.get(candidate.revision)
    if found is None:
        deployment = children.serving_deployment(s.release, measured(candidate, s.seen.verdict), s.settings)
        message = f"starting {s.release.spec.serving.replicas} pods of {candidate.revision}"
        return Waiting("CandidateStarting", message, apply=(deployment,), poll_after=LOOK_AGAIN)
    if found.problem:
        return Failed("CandidateUnavailable", f"{candidate.revision} did not start: {found.problem}")
    return _warm_up(s, found)


def _warm_up(s: Situation, found: ObservedRevision) -> Outcome:
    name = found.record.revision
    wanted = s.release.spec.serving.replicas
    if found.replicas != wanted:
        apply = children.scale(s.release, found.name, found.replicas)
        message = f"giving {name} {wanted} pods"
        return Waiting("CandidateStarting", message, apply=(apply,), poll_after=LOOK_AGAIN)
    if wanted == 0:
        message = "spec.serving.replicas is 0: a candidate without pods cannot be switched to"
        return Waiting("ScaledToZero", message, poll_after=LOOK_AGAIN)
    if not found.is_fully_available:
        message = f"{found.ready} of {found.replicas} pods of {name} are ready"
        return Waiting("CandidateStarting", message, poll_after=LOOK_AGAIN)
    return Done()


def promote(s: Situation) -> Outcome:
    candidate = s.candidate
    if candidate is None:
        return Done()
    service = s.seen.service
    if service is not None and not service.is_ours:
        return _service_is_taken(s)
    strategy = s.strategy
    if strategy.promotion == "Manual" and strategy.promoted_revision != candidate.revision:
        message = f"{candidate.revision} passed; set spec.strategy.blueGreen.promotedRevision to switch to it"
        return Waiting("AwaitingPromotion", message, poll_after=LOOK_AGAIN)
    message = f"{candidate.revision} passed and is available"
    return Intend("Promoting", message, poll_after=AT_ONCE, to_revision=candidate.revision)

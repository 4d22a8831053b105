"""Decide what a ModelRelease needs next.

A release is a ladder of steps towards the revision that its spec asks for, while another one serves:

    resolve → compress → gate → start the candidate → promote → watch → retire the old

Records in the object store, Deployments and the Service's selector say how far it is. What cannot be seen
there is recorded in the status before its effect: the intent to switch, and who was rejected. An intended
switch is finished and the Service kept right before anything new is begun.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from tributary_api.release import ModelReleaseStatus, RejectedRevision
from tributary_operator.decision import Apply, Decision, Delete, Done, Failed, Outcome, Waiting
from tributary_operator.releases import children, steps
from tributary_operator.releases.situation import Situation
from tributary_operator.releases.status import Position, events, status

Step = Callable[[Situation], Outcome]

STEPS: tuple[Step, ...] = (
    steps.finish_switch,
    steps.keep_service,
    steps.go_back,  # before the watch: a person may see what the analysis does not
    steps.watch_stable,
    steps.resolve_model,
    steps.heed_rejection,
    steps.compress_model,
    steps.pass_gate,
    steps.start_candidate,
    steps.promote,
)

HEALTH_PERIOD = timedelta(seconds=15)
"""How often a release that has all it wants looks at its Deployments."""


def decide(s: Situation) -> Decision[ModelReleaseStatus]:
    for step in STEPS:
        match step(s):
            case Done():
                continue
            case Waiting() as waiting:
                return _pass(s, Position(waiting), waiting)
            case Failed(reason, message):
                return _pass(s, Position(rejected=_rejection(s, reason, message)), Waiting(reason, message))
    return _pass(s, Position(), Waiting("", "", poll_after=HEALTH_PERIOD))


def _rejection(s: Situation, reason: str, message: str) -> RejectedRevision:
    return RejectedRevision(
        revision=s.target, stable=s.stable, reason=reason, message=message[: steps.MESSAGE_LENGTH_MAX]
    )


def _pass(s: Situation, at: Position, waiting: Waiting) -> Decision[ModelReleaseStatus]:
    new = status(s, at)
    delete = (*_retired(s, at), *waiting.delete)
    return Decision(
        record=waiting.record,
        apply=(*waiting.apply, *_upkeep(s)),
        delete=delete,
        status=new,
        events=events(s.release.status.conditions, new.conditions),
        poll_after=_next_look(s, waiting.poll_after),
    )


def _upkeep(s: Situation) -> tuple[Apply, ...]:
    """What a release needs at every step: the number of its pods, and a limit to their disruption."""
    apply: list[Apply] = []
    if not s.seen.has_disruption_budget and s.seen.revisions:
        apply.append(children.disruption_budget(s.release))
    stable = s.seen.revisions.get(s.stable)
    is_switching = s.transition is not None and s.transition.switched_at is None
    if (
        stable is not None
        and stable.replicas != s.release.spec.serving.replicas
        # A pod that starts would look like one that was lost.
        and not s.is_watching
        and not is_switching
    ):
        apply.append(children.scale(s.release, stable.name, stable.replicas))
    return tuple(apply)


def _retired(s: Situation, at: Position) -> tuple[Delete, ...]:
    """Deployments that nothing needs, and Services under earlier names once the present one serves."""
    deployments = tuple(found.deletion for found in s.retired)
    if at.waiting is None and s.is_serving:
        return (*deployments, *(service.deletion for service in s.seen.other_services))
    return deployments


def _next_look(s: Situation, poll_after: timedelta) -> timedelta:
    """In time for the end of what is kept warm."""
    if s.kept_until is None or s.kept_until <= s.now:
        return poll_after
    return min(poll_after, s.kept_until - s.now)

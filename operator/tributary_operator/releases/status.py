"""The status of a release: Ready is about what serves, Reconciling and Stalled about what shall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tributary_api.meta import Condition, ConditionStatus
from tributary_api.release import ModelReleaseStatus, RejectedRevision, Revision, Transition
from tributary_operator import conditions, names
from tributary_operator.cluster import selector
from tributary_operator.decision import Event, Waiting
from tributary_operator.releases import identity
from tributary_operator.releases.measures import measured
from tributary_operator.releases.situation import Situation
from tributary_operator.releases.steps import Intend

HISTORY_MAX = 10
REJECTED_MAX = 10
GATE_PASSED = "GatePassed"
SERVING = "Serving"
UNAVAILABLE = "Unavailable"

Level = Literal["Normal", "Warning"]


@dataclass(frozen=True, slots=True)
class Position:
    """Where the release stands: a step that waits, or nothing left to do; and who was rejected on the way."""

    waiting: Waiting | None = None
    rejected: RejectedRevision | None = None


def status(s: Situation, at: Position) -> ModelReleaseStatus:
    stable = s.seen.revisions.get(s.stable)
    return ModelReleaseStatus(
        observed_generation=s.release.metadata.generation,
        conditions=conditions.merged(s.release.status.conditions, _conditions(s, at)),
        replicas=stable.ready if stable is not None else 0,
        selector=selector(names.serving_labels(s.release, s.stable)) if s.stable else "",
        model=s.seen.source.model,
        stable=_stable(s),
        candidate=_candidate(s),
        best=s.best,
        transition=_transition(s, at),
        spec_hash=identity.spec_hash(s.release),
        rejected_revisions=_rejected(s, at),
        history=_history(s),
    )


def _stable(s: Situation) -> Revision | None:
    record = s.stable_record
    if record is None:
        return None
    switch = s.transition
    if switch is not None and switch.switched_at is not None and switch.to_revision == s.stable:
        return record.model_copy(update={"promoted_at": switch.switched_at})
    before = s.release.status.stable
    return record.model_copy(update={"promoted_at": before.promoted_at if before is not None else None})


def _candidate(s: Situation) -> Revision | None:
    if not s.target:
        return s.release.status.candidate  # its pods are kept while nobody knows what is asked for
    candidate = s.candidate
    return measured(candidate, s.seen.verdict) if candidate is not None else None


def _transition(s: Situation, at: Position) -> Transition | None:
    if isinstance(at.waiting, Intend):
        return Transition(from_revision=s.stable, to_revision=at.waiting.to_revision, intended_at=s.now)
    last = s.transition
    # While the model is unknown, so is what is wanted.
    is_given_up = (
        last is not None and last.switched_at is None and s.target and not s.is_wanted(last.to_revision)
    )
    return None if is_given_up else last


def _rejected(s: Situation, at: Position) -> list[RejectedRevision]:
    new = at.waiting.rejected if isinstance(at.waiting, Intend) else at.rejected
    if new is None:
        return list(s.rejections)
    others = [r for r in s.rejections if (r.revision, r.stable) != (new.revision, new.stable)]
    return [new, *others][:REJECTED_MAX]


def _history(s: Situation) -> list[Revision]:
    """Earlier stable revisions, each once, the latest first."""
    before = s.release.status.stable
    known = ([before] if before is not None else []) + list(s.release.status.history)
    latest: dict[str, Revision] = {}
    for revision in known:
        latest.setdefault(revision.revision, revision)
    latest.pop(s.stable, None)
    return list(latest.values())[:HISTORY_MAX]


def _conditions(s: Situation, at: Position) -> list[Condition]:
    waiting = at.waiting
    stalled = (waiting is not None and waiting.stalled) or at.rejected is not None
    reason, message = _position(s, at)

    def flag(type_: str, on: bool) -> Condition:
        return _condition(s, type_, "True" if on else "False", reason, message if on else "")

    return [
        _ready(s, reason, message),
        flag(conditions.RECONCILING, waiting is not None and not stalled),
        flag(conditions.STALLED, stalled),
        *_gate(s),
    ]


def _position(s: Situation, at: Position) -> tuple[str, str]:
    if at.rejected is not None:
        return at.rejected.reason, at.rejected.message
    if at.waiting is not None:
        return at.waiting.reason, at.waiting.message
    return SERVING, f"{s.stable} is what the spec asks for"


def _ready(s: Situation, reason: str, message: str) -> Condition:
    if not s.is_serving:
        why = UNAVAILABLE if reason == SERVING else reason
        return _condition(s, conditions.READY, "False", why, message)
    found = s.seen.revisions[s.stable]
    words = (
        f"{s.release.spec.serving.service_name} serves {s.stable} of model {found.record.model.digest}, "
        f"{found.ready} of {found.replicas} pods"
    )
    return _condition(s, conditions.READY, "True", SERVING, words)


def _gate(s: Situation) -> list[Condition]:
    """About the candidate, or the last one that there was."""
    verdict = s.seen.verdict
    if verdict is not None:
        passed: ConditionStatus = "True" if verdict.verdict == "PASS" else "False"
        return [_condition(s, GATE_PASSED, passed, verdict.reason, verdict.message or verdict.reason)]
    return [] if s.target in {"", s.stable} else [_condition(s, GATE_PASSED, "Unknown", "Pending", "")]


def _condition(s: Situation, type_: str, value: ConditionStatus, reason: str, message: str) -> Condition:
    generation = s.release.metadata.generation
    return conditions.condition(type_, value, reason, message, generation=generation, now=s.now)


def events(old: Sequence[Condition], new: Sequence[Condition]) -> tuple[Event, ...]:
    """One when the release gets to another step, or stalls; one when it begins or ceases to serve."""
    return (*_step_event(old, new), *_serving_event(old, new))


def _step_event(old: Sequence[Condition], new: Sequence[Condition]) -> tuple[Event, ...]:
    for type_ in (conditions.STALLED, conditions.RECONCILING):
        before, after = conditions.find(old, type_), conditions.find(new, type_)
        if after is None or after.status != "True":
            continue
        if before is None or before.status != "True" or before.reason != after.reason:
            level: Level = "Warning" if type_ == conditions.STALLED else "Normal"
            return (Event(after.reason, after.message, level),)
    return ()


def _serving_event(old: Sequence[Condition], new: Sequence[Condition]) -> tuple[Event, ...]:
    before, after = conditions.find(old, conditions.READY), conditions.find(new, conditions.READY)
    was_ready = before is not None and before.status == "True"
    if after is None or was_ready == (after.status == "True"):
        return ()
    if was_ready:
        return (Event(UNAVAILABLE, after.message, "Warning"),)
    return (Event(SERVING, after.message),)

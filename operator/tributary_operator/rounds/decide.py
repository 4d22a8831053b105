"""Decide what a FederatedRound needs next.

A round is a ladder of steps. A step is done when the thing that it makes exists in the object store or a
ledger, so the first step that is not done is where the round stands, whatever happened to pods or to us
meanwhile. There is no stored program counter to get out of date: the status is output only.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from tributary_api.meta import NamespacedName
from tributary_api.records import LedgerKind, OutcomeKind, RoundOutcome
from tributary_api.round import FederatedRoundStatus
from tributary_operator.decision import (
    AT_ONCE,
    POLL_AFTER,
    Decision,
    Delete,
    Done,
    Failed,
    LedgerRecord,
    Outcome,
    PutRecord,
    Record,
    Waiting,
)
from tributary_operator.jobs import JobState
from tributary_operator.rounds import children
from tributary_operator.rounds.observed import Attempts, ObservedRound
from tributary_operator.rounds.selecting import plan_round
from tributary_operator.rounds.situation import Situation
from tributary_operator.rounds.status import Position, events, metrics_of, status
from tributary_operator.rounds.training import Standing, has_moved_on, members, stop_all, stops, train_clients
from tributary_operator.settings import Settings

LEDGER_ENTRIES_MAX = 50
"""Of one pass, so that a large round still notices what happens meanwhile."""

PROGRESS_AFTER = timedelta(seconds=10)
"""How often the aggregation's progress is looked at."""

Step = Callable[[Situation], Outcome]


def reserve_budget(s: Situation) -> Outcome:
    """Every member is charged before any of them starts; who is refused stays out.

    What it will cost is shown first: the status is written after the records of a pass.
    """
    if has_moved_on(s.seen):
        return Done()
    charged = s.seen.reserved | s.seen.deltas.keys()
    open_ = [
        m.planned for m in members(s) if m.standing is not Standing.FAILED and m.planned.client not in charged
    ]
    if not open_:
        return Done()
    if not s.seen.is_announced:
        message = "showing what privacy will cost before it is reserved"
        return Waiting("Announcing", message, poll_after=AT_ONCE)
    return Waiting(
        reason="Reserving",
        message=f"setting privacy budget aside for {len(open_)} clients",
        record=tuple(LedgerRecord(LedgerKind.RESERVE, planned) for planned in open_[:LEDGER_ENTRIES_MAX]),
        poll_after=AT_ONCE,
    )


def aggregate_deltas(s: Situation) -> Outcome:
    if s.seen.aggregate is not None:
        return Done()
    if failed := _exhausted(s.seen.aggregation, s.settings):
        return failed
    keys = {client: m.signature.key for client, m in s.seen.deltas.items() if m.signature is not None}
    job = children.aggregate_job(s.run, keys, s.seen.aggregation.following)
    return Waiting(
        reason="Aggregating",
        message=f"combining the deltas of {len(keys)} clients",
        apply=() if s.seen.aggregation.active else (job,),
        poll_after=PROGRESS_AFTER if s.seen.aggregation.active else POLL_AFTER,
        delete=stops(s.seen, list(s.seen.training)),  # the stragglers of a deadline
    )


def evaluate_model(s: Situation) -> Outcome:
    """Measures; it does not judge. A failed evaluation leaves a good model, and says that it failed."""
    if s.fedround.spec.evaluation is None or s.seen.report is not None or s.seen.aggregate is None:
        return Done()
    if _exhausted(s.seen.evaluation, s.settings):
        return Done()
    job = children.evaluate_job(s.run, s.seen.aggregate.model, s.seen.evaluation.following)
    return Waiting(
        reason="Evaluating",
        message="scoring the old and the new model on the public data set",
        apply=() if s.seen.evaluation.active else (job,),
    )


def _exhausted(attempts: Attempts, settings: Settings) -> Failed | None:
    last = attempts.last_failure
    if last is None or not attempts.is_exhausted(settings.hub_job_backoff_limit):
        return None
    return Failed(last.reason, last.message)


def complete_round(s: Situation) -> Outcome:
    outcome = _outcome(s, OutcomeKind.COMPLETE, "RoundComplete", "")
    return Waiting(
        reason="Completing",
        message="recording the outcome",
        record=(PutRecord(s.settings.layout.outcome(s.plan.run_key), outcome),),
        poll_after=AT_ONCE,
    )


STEPS: tuple[tuple[str, Step], ...] = (
    ("BudgetReserved", reserve_budget),
    ("Trained", train_clients),
    ("Aggregated", aggregate_deltas),
    ("Evaluated", evaluate_model),
    ("Complete", complete_round),
)


def decide(s: Situation) -> Decision[FederatedRoundStatus]:
    if s.seen.outcome is not None:
        return _finished(s, s.seen.outcome)
    if s.fedround.spec.suspend:
        waiting = Waiting("Suspended", "spec.suspend is true", delete=stop_all(s.seen))
        step = _position(s).step if s.seen.plan is not None else "Planned"
        return _decision(s, Position(step, waiting))
    return _decision(s, _position(s))


def _position(s: Situation) -> Position:
    if s.seen.plan is None:
        return Position("Planned", plan_round(s))
    for name, step in STEPS:
        match step(s):
            case Done():
                continue
            case Waiting() as waiting:
                return Position(name, waiting)
            case Failed() as failed:
                return Position(name, _failing(s, failed))
    raise AssertionError("the last step ends in an outcome")


def _decision(s: Situation, at: Position) -> Decision[FederatedRoundStatus]:
    new = status(s, at)
    return Decision(
        record=at.waiting.record,
        apply=at.waiting.apply,
        delete=at.waiting.delete,
        status=new,
        events=events(s.fedround.status, new),
        poll_after=at.waiting.poll_after,
    )


def _failing(s: Situation, failed: Failed) -> Waiting:
    """The end, recorded before it is announced: from then on the round starts nothing."""
    outcome = _outcome(s, OutcomeKind.FAILED, failed.reason, failed.message)
    record = PutRecord(s.settings.layout.outcome(s.plan.run_key), outcome)
    return Waiting(failed.reason, failed.message, record=(record,), poll_after=AT_ONCE, stalled=True)


def _outcome(s: Situation, kind: OutcomeKind, reason: str, message: str) -> RoundOutcome:
    made = s.seen.aggregate
    failed = [m.failure for m in members(s) if m.failure is not None]
    return RoundOutcome(
        run_key=s.plan.run_key,
        round=s.plan.round,
        outcome=kind,
        reason=reason,
        message=message,
        model=made.model if made is not None else None,
        metrics=metrics_of(s.seen.report),
        submitted=made.included if made is not None else sorted(s.seen.deltas, key=str),
        failed=[*failed, *(made.excluded if made is not None else ())],
        finished_at=s.now,
    )


def _finished(s: Situation, outcome: RoundOutcome) -> Decision[FederatedRoundStatus]:
    """Nothing is started any more; ledgers are closed, what still runs is stopped, old children go."""
    new = status(s, outcome)
    open_ = _closings(s.seen, outcome.submitted)
    remaining = outcome.finished_at + timedelta(seconds=s.fedround.spec.ttl_seconds_after_finished) - s.now
    is_expired = remaining <= timedelta(0)
    return Decision(
        record=open_[:LEDGER_ENTRIES_MAX],
        apply=(),
        delete=_remains(s.seen) if is_expired else stop_all(s.seen),
        status=new,
        events=events(s.fedround.status, new),
        poll_after=AT_ONCE if open_ else None if is_expired else remaining,
    )


def _closings(seen: ObservedRound, submitted: list[NamespacedName]) -> tuple[Record, ...]:
    """Settle who delivered; release who was reserved and never launched, which the ledger itself decides."""
    cohort = seen.plan.cohort if seen.plan is not None else []
    delivered = {*submitted, *seen.deltas}
    return tuple(
        LedgerRecord(LedgerKind.SETTLE, planned)
        if planned.client in delivered
        else LedgerRecord(LedgerKind.RELEASE, planned, "the round ended without this client")
        for planned in cohort
        if planned.client not in seen.closed
    )


def _remains(seen: ObservedRound) -> tuple[Delete, ...]:
    everything = [*seen.training.values(), seen.aggregation, seen.evaluation]
    return tuple(
        job.deletion for attempts in everything for job in attempts.jobs if job.state is not JobState.STOPPING
    )

"""The status of a round: mirrors what was observed, is written once a pass, and is never read to decide."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tributary_api.meta import Condition, ConditionStatus
from tributary_api.records import EvaluationReport, OutcomeKind, RoundOutcome, RoundPlan
from tributary_api.round import (
    AggregationStatus,
    ClientCounts,
    ClientFailure,
    FederatedRoundStatus,
    PrivacyPlan,
)
from tributary_api.shared import Metric, ModelRef
from tributary_operator import conditions
from tributary_operator.decision import Event, Waiting
from tributary_operator.rounds.observed import ObservedRound
from tributary_operator.rounds.selecting import screened
from tributary_operator.rounds.situation import Situation
from tributary_operator.rounds.training import Member, Standing, members

NOISE_ACCEPTABLE = "NoiseAcceptable"
NOISE_TO_SIGNAL_MAX = 10.0
"""Above it, a step's noise is ten times as long as the longest possible mean gradient, and even a hundred
steps that all pull one way only just come up to their noise (steps add up as T, noise as √T). The demo's
rounds, which do learn, stand at 2.3."""

EVALUATED = "Evaluated"
COMPLETE = "Complete"
STEP_CONDITIONS = ("Planned", "BudgetReserved", "Trained", "Aggregated", EVALUATED, COMPLETE)
FAILED = "Failed"
LEDGERS_CLOSED = "LedgersClosed"
FAILURES_SHOWN_MAX = 20


@dataclass(frozen=True, slots=True)
class Position:
    """The step at which the round stands."""

    step: str
    waiting: Waiting


@dataclass(frozen=True, slots=True)
class Census:
    """The clients of a round, counted."""

    counts: ClientCounts
    failures: Sequence[ClientFailure]


def status(s: Situation, at: Position | RoundOutcome) -> FederatedRoundStatus:
    seen, old = s.seen, s.fedround.status
    census = _census(s, at)
    return FederatedRoundStatus(
        observed_generation=s.fedround.metadata.generation,
        conditions=conditions.merged(old.conditions, _conditions(s, at)),
        run_key=s.fedround.run_key,
        clients=census.counts,
        clients_summary=f"{census.counts.submitted}/{census.counts.selected}",
        failed_clients=list(census.failures[:FAILURES_SHOWN_MAX]),
        privacy=_privacy(seen, old.privacy),
        base_model=_base_model(seen) or old.base_model,
        aggregation=_aggregation(s) or old.aggregation,
        model=seen.aggregate.model if seen.aggregate is not None else _model(at),
        metrics=at.metrics if isinstance(at, RoundOutcome) else metrics_of(seen.report),
    )


def _model(at: Position | RoundOutcome) -> ModelRef | None:
    return at.model if isinstance(at, RoundOutcome) else None


def _conditions(s: Situation, at: Position | RoundOutcome) -> list[Condition]:
    if isinstance(at, RoundOutcome):
        return _final(s, at)
    progress: conditions.Progress = "stalled" if at.waiting.stalled else "progressing"
    if s.fedround.spec.suspend:
        progress = "done"  # neither on its way nor in need of anybody: kstatus has no word for paused
    reason, message = at.waiting.reason, at.waiting.message
    return [
        *conditions.summary(progress, "False", reason, message, generation=_generation(s), now=s.now),
        *_passed(s, STEP_CONDITIONS[: STEP_CONDITIONS.index(at.step)]),
        _condition(s, at.step, "False", reason, message),
        *_noise(s),
    ]


def _noise(s: Situation) -> list[Condition]:
    """A warning about a plan that cannot help, before it costs anything. The round goes on all the same."""
    ratios = _noise_to_signal(s.seen)
    if not ratios:
        return []
    if max(ratios) <= NOISE_TO_SIGNAL_MAX:
        return [_condition(s, NOISE_ACCEPTABLE, "True", "NoiseNearSignal")]
    message = (
        f"the noise of a step is {max(ratios):.3g} times as long as the longest possible mean gradient; "
        f"above {NOISE_TO_SIGNAL_MAX:g} a round can hardly help: raise privacy.epsilon or "
        "training.expectedBatchSize, or train fewer weights (method.lora with a smaller rank or fewer "
        "targetModules); spec.suspend stops this round before it spends more"
    )
    return [_condition(s, NOISE_ACCEPTABLE, "False", "NoiseAboveSignal", message)]


def _generation(s: Situation) -> int:
    return s.fedround.metadata.generation


def _condition(s: Situation, type_: str, value: ConditionStatus, reason: str, message: str = "") -> Condition:
    return conditions.condition(type_, value, reason, message, generation=_generation(s), now=s.now)


def _passed(s: Situation, steps: Sequence[str]) -> list[Condition]:
    return [_evaluated(s) if step == EVALUATED else _condition(s, step, "True", step) for step in steps]


def _evaluated(s: Situation) -> Condition:
    measured = s.seen.outcome.metrics if s.seen.outcome is not None else s.seen.report
    if measured:
        return _condition(s, EVALUATED, "True", EVALUATED)
    if s.fedround.spec.evaluation is None:
        return _condition(s, EVALUATED, "False", "NotRequested", "spec.evaluation is absent")
    old, failed = conditions.find(s.fedround.status.conditions, EVALUATED), s.seen.evaluation.last_failure
    if old is not None and old.status == "False" and failed is None:
        return old  # after the outcome nobody asks again why there was no report
    reason, message = (failed.reason, failed.message) if failed else ("NoReport", "there is no report")
    return _condition(s, EVALUATED, "False", reason, message)


def _final(s: Situation, outcome: RoundOutcome) -> list[Condition]:
    is_complete = outcome.outcome is OutcomeKind.COMPLETE
    value: ConditionStatus = "True" if is_complete else "False"
    progress: conditions.Progress = "done" if is_complete else "stalled"
    reason, message = outcome.reason, outcome.message or _success(outcome)
    return [
        *conditions.summary(progress, value, reason, message, generation=_generation(s), now=s.now),
        *(_passed(s, STEP_CONDITIONS) if is_complete else ()),
        _condition(s, COMPLETE, value, reason, message),
        _condition(s, FAILED, "False" if is_complete else "True", reason, message),
        _ledgers_closed(s),
    ]


def _ledgers_closed(s: Situation) -> Condition:
    cohort = {planned.client for planned in s.plan.cohort} if s.seen.plan is not None else set()
    if cohort <= s.seen.closed:
        return _condition(s, LEDGERS_CLOSED, "True", LEDGERS_CLOSED)
    return _condition(s, LEDGERS_CLOSED, "False", "Closing", "settling what was delivered")


def _success(outcome: RoundOutcome) -> str:
    return f"the new model averages {len(outcome.submitted)} clients"


def _census(s: Situation, at: Position | RoundOutcome) -> Census:
    if s.seen.plan is None:
        return _before_plan(s)
    if isinstance(at, RoundOutcome):
        return _after(s.seen.plan, at)
    return _under_way(members(s), s.seen.plan)


def _before_plan(s: Situation) -> Census:
    if s.seen.selection is None:
        return Census(ClientCounts(), ())
    excluded = screened(s, s.seen.selection).excluded
    selected = len(s.seen.selection.candidates)
    counts = ClientCounts(selected=selected, pending=selected - len(excluded), excluded=len(excluded))
    return Census(counts, excluded)


def _under_way(cohort: Sequence[Member], plan: RoundPlan) -> Census:
    count = Counter(member.standing for member in cohort)
    counts = ClientCounts(
        selected=len(cohort),
        pending=sum(count[s] for s in (Standing.PENDING, Standing.UNSEEN, Standing.TO_START)),
        running=count[Standing.RUNNING],
        submitted=count[Standing.DELIVERED],
        failed=count[Standing.FAILED],
        excluded=len(plan.excluded),
    )
    return Census(counts, [*(m.failure for m in cohort if m.failure is not None), *plan.excluded])


def _after(plan: RoundPlan, outcome: RoundOutcome) -> Census:
    counts = ClientCounts(
        selected=len(plan.cohort),
        submitted=len(outcome.submitted),
        failed=len(outcome.failed),
        excluded=len(plan.excluded),
    )
    return Census(counts, [*outcome.failed, *plan.excluded])


def _aggregation(s: Situation) -> AggregationStatus | None:
    made, marks = s.seen.aggregate, s.seen.progress
    if made is not None:
        return AggregationStatus(
            percent=100,
            delta_bytes=made.delta_bytes,
            bytes_read=made.bytes_read,
            bytes_written=made.bytes_written,
        )
    if not marks:
        return None
    # Of pods that have not said anything yet, as much is expected as of the others.
    expected = sum(mark.bytes_total for mark in marks) * s.fedround.spec.aggregation.parallelism / len(marks)
    return AggregationStatus(
        percent=min(99, int(100 * sum(mark.bytes_done for mark in marks) / max(1, expected))),
        megabytes_per_second=sum(mark.bytes_per_second for mark in marks) // 10**6,
    )


def _privacy(seen: ObservedRound, old: PrivacyPlan) -> PrivacyPlan:
    """What privacy costs, known before anything is spent."""
    if seen.plan is None:
        return old
    mechanisms = [planned.grant.mechanism for planned in seen.plan.cohort]
    affordable = seen.affordable_rounds
    return PrivacyPlan(
        noise_multiplier=_range([m.noise_multiplier for m in mechanisms]),
        expected_batch_size=mechanisms[0].expected_batch_size,
        noise_to_signal=_range(_noise_to_signal(seen)),
        affordable_rounds=affordable if affordable is not None else old.affordable_rounds,
    )


def _noise_to_signal(seen: ObservedRound) -> list[float]:
    """σ·√d / (q·N) of each member: the noise's length over the largest length of a mean gradient."""
    if seen.plan is None or not seen.trained_weights:
        return []
    mechanisms = [planned.grant.mechanism for planned in seen.plan.cohort]
    length = math.sqrt(seen.trained_weights)
    return [m.noise_multiplier * length / m.expected_batch_size for m in mechanisms]


def _range(values: Sequence[float]) -> str:
    ends = [f"{value:.4g}" for value in (min(values), max(values))] if values else []
    return " to ".join(dict.fromkeys(ends))


def _base_model(seen: ObservedRound) -> ModelRef | None:
    if seen.plan is not None:
        return seen.plan.base_model
    return seen.selection.base_model.ref if seen.selection is not None else None


METRIC_PREFIXES = {"baseline": "baseline", "new": ""}


def metrics_of(report: EvaluationReport | None) -> list[Metric]:
    """baselineLoss, loss, baselinePerplexity and so on: public numbers of a public data set."""
    return [
        Metric(name=_metric_name(METRIC_PREFIXES.get(score.role, score.role), name), value=f"{value:.6g}")
        for score in (report.scores if report is not None else ())
        for name, value in (
            ("loss", score.loss),
            ("perplexity", score.perplexity),
            ("accuracy", score.accuracy),
        )
    ]


def _metric_name(prefix: str, name: str) -> str:
    return prefix + name.capitalize() if prefix else name


def events(old: FederatedRoundStatus, new: FederatedRoundStatus) -> tuple[Event, ...]:
    """What changed since the status that was written last."""
    known = {(f.client, f.reason) for f in old.failed_clients}
    failed = [f for f in new.failed_clients if (f.client, f.reason) not in known]
    noise = conditions.find(new.conditions, NOISE_ACCEPTABLE)
    is_warned = conditions.find(old.conditions, NOISE_ACCEPTABLE) is not None
    is_loud = noise is not None and noise.status == "False" and not is_warned
    return (
        *((Event(noise.reason, noise.message, "Warning"),) if noise is not None and is_loud else ()),
        *(Event(f.reason, f"client {f.client}: {f.message}", "Warning") for f in failed),
        *conditions.transition(old.conditions, new.conditions),
    )

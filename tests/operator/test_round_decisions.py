"""Rows: one world in, the exact step, reason and Jobs out."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from round_worlds import (
    BASE,
    CRASH,
    EMPTY,
    EVALUATION,
    NEW,
    T0,
    a_client,
    a_delta,
    a_job,
    a_plan,
    a_report,
    a_round,
    a_selection,
    an_aggregate,
    attempts,
    decided,
    nn,
    started,
)

from tributary_api.records import LedgerKind, OutcomeKind, ProgressMark, RoundOutcome
from tributary_operator import conditions, names
from tributary_operator.api import Forbidden
from tributary_operator.decision import LedgerRecord, PutRecord
from tributary_operator.jobs import Denied, JobState
from tributary_operator.rounds.eligibility import failure
from tributary_operator.rounds.observed import BaseModel, Candidate, ObservedRound
from tributary_operator.rounds.selecting import COHORT_MAX
from tributary_operator.rounds.training import ACCESS_LOST_AFTER

LATER = T0 + timedelta(hours=3)
RUN = names.train_job(a_round(), nn("a"), 0).split("-")[1]


def ready(decision: Any) -> Any:
    return conditions.find(decision.status.conditions, conditions.READY)


def planned(*clients: str, fedround: Any = None, **facts: Any) -> ObservedRound:
    """A planned round whose budget is reserved."""
    fedround = fedround or a_round()
    objects = [a_client(name) for name in clients]
    return ObservedRound(
        plan=a_plan(fedround, objects),
        clients={nn(name): client for name, client in zip(clients, objects, strict=True)},
        **{"reserved": frozenset(map(nn, clients)), **facts},
    )


def deltas(seen: ObservedRound, *clients: str) -> dict[Any, Any]:
    assert seen.plan is not None
    return {nn(name): a_delta(seen.plan, name) for name in clients}


def case(
    id_: str, fedround: Any, seen: Any, at: Any = T0, *, reason: str, starts: tuple[str, ...] = ()
) -> Any:
    return pytest.param(fedround, seen, at, reason, list(starts), id=id_)


AB = planned("a", "b")
HALF = a_round(clients={"minAvailable": 1})
PUBLIC = a_round(evaluation=EVALUATION)
DELIVERED = planned("a", "b", deltas=deltas(AB, "a", "b"))


def of(fedround: Any, *clients: str, delivered: tuple[str, ...] = (), **facts: Any) -> ObservedRound:
    bare = planned(*clients, fedround=fedround)
    return planned(*clients, fedround=fedround, deltas=deltas(bare, *delivered), **facts)


def job(fedround: Any, client: str, attempt: int = 0) -> str:
    return names.train_job(fedround, nn(client), attempt)


@pytest.mark.parametrize(
    ("fedround", "seen", "at", "reason", "starts"),
    [
        case(
            "new-is-planned",
            a_round(),
            ObservedRound(selection=a_selection(a_client("a"))),
            reason="Planning",
        ),
        case("nobody-selected", a_round(), ObservedRound(selection=a_selection()), reason="NoClientSelected"),
        case(
            "quorum-above-cohort",
            a_round(clients={"minAvailable": 2}),
            ObservedRound(selection=a_selection(a_client("a"))),
            reason="QuorumImpossible",
        ),
        case(
            "everybody-excluded",
            a_round(),
            ObservedRound(selection=a_selection(a_client("a", suspend=True))),
            reason="QuorumImpossible",
        ),
        case(
            "quorum-too-small-for-the-strategy",
            a_round(aggregation={"strategy": "Krum", "byzantineClients": 1}, clients={"minAvailable": "80%"}),
            ObservedRound(selection=a_selection(*map(a_client, "abcde"))),
            reason="StrategyImpossible",
        ),
        case(
            "more-clients-than-the-aggregator-can-be-told-of",
            a_round(),
            ObservedRound(selection=a_selection(*(a_client(f"c{i}") for i in range(COHORT_MAX + 1)))),
            reason="CohortTooLarge",
        ),
        case(
            "quorum-just-large-enough-for-the-strategy",
            a_round(aggregation={"strategy": "Krum", "byzantineClients": 1}),
            ObservedRound(selection=a_selection(*map(a_client, "abcde"))),
            reason="Planning",
        ),
        case(
            "no-model",
            a_round(),
            ObservedRound(
                selection=a_selection(base_model=BaseModel(reason="ModelMissing", is_stalled=True))
            ),
            reason="ModelMissing",
        ),
        case(
            "noise-is-being-solved",
            a_round(),
            ObservedRound(selection=a_selection(a_client("a"), sigmas={})),
            reason="Planning",
        ),
        case("announces-first", a_round(), planned("a", "b", reserved=frozenset()), reason="Announcing"),
        case(
            "reserves-then",
            a_round(),
            planned("a", "b", reserved=frozenset(), is_announced=True),
            reason="Reserving",
        ),
        case(
            "launches-all",
            a_round(),
            AB,
            reason="Training",
            starts=(job(a_round(), "a"), job(a_round(), "b")),
        ),
        case(
            "launch-rate",
            a_round(clients={"launchRatePerSecond": 1}),
            of(a_round(clients={"launchRatePerSecond": 1}), "a", "b"),
            reason="Training",
            starts=(job(a_round(clients={"launchRatePerSecond": 1}), "a"),),
        ),
        case(
            "running-is-left-alone",
            a_round(),
            planned("a", training={nn("a"): attempts("a", JobState.RUNNING)}),
            reason="Training",
        ),
        case(
            "stopping-is-waited-for",
            a_round(),
            planned("a", training={nn("a"): attempts("a", JobState.STOPPING)}),
            reason="Training",
        ),
        case(
            "crash-is-tried-again",
            a_round(),
            planned("a", training={nn("a"): attempts("a", JobState.FAILED, failure=CRASH)}),
            reason="Training",
            starts=(job(a_round(), "a", 1),),
        ),
        case(
            "crashes-use-up-the-attempts",
            a_round(),
            planned("a", training={nn("a"): attempts("a", JobState.FAILED, JobState.FAILED, failure=CRASH)}),
            reason="QuorumLost",
        ),
        case(
            "empty-data-is-not-tried-again",
            a_round(),
            planned("a", training={nn("a"): attempts("a", JobState.FAILED, failure=EMPTY)}),
            reason="QuorumLost",
        ),
        case(
            "quorum-without-the-failed",
            HALF,
            of(
                HALF,
                "a",
                "b",
                delivered=("a",),
                training={nn("b"): attempts("b", JobState.FAILED, failure=EMPTY)},
            ),
            reason="Aggregating",
            starts=(names.aggregate_job(HALF, 0),),
        ),
        case(
            "quorum-waits-for-the-running",
            HALF,
            of(HALF, "a", "b", delivered=("a",), training={nn("b"): attempts("b", JobState.RUNNING)}),
            reason="Training",
        ),
        case(
            "deadline-with-quorum",
            HALF,
            of(HALF, "a", "b", delivered=("a",), training={nn("b"): attempts("b", JobState.RUNNING)}),
            LATER,
            reason="Aggregating",
            starts=(names.aggregate_job(HALF, 0),),
        ),
        case("deadline-without-quorum", a_round(), AB, LATER, reason="DeadlineExceeded"),
        case(
            "aggregates",
            a_round(),
            DELIVERED,
            reason="Aggregating",
            starts=(names.aggregate_job(a_round(), 0),),
        ),
        case(
            "aggregation-fails",
            a_round(),
            planned(
                "a",
                deltas=deltas(AB, "a"),
                aggregation=attempts("hub", JobState.FAILED, failure=EMPTY, stage=names.AGGREGATE),
            ),
            reason="DataEmpty",
        ),
        case(
            "evaluates",
            PUBLIC,
            of(PUBLIC, "a", delivered=("a",), aggregate=an_aggregate(AB.plan, [nn("a")])),
            reason="Evaluating",
            starts=(names.evaluate_job(PUBLIC, 0),),
        ),
        case(
            "evaluation-not-asked-for",
            a_round(),
            planned("a", deltas=deltas(AB, "a"), aggregate=an_aggregate(AB.plan, [nn("a")])),
            reason="Completing",
        ),
        case("suspended", a_round(suspend=True), AB, reason="Suspended"),
    ],
)
def test_decide(fedround: Any, seen: Any, at: Any, reason: str, starts: list[str]) -> None:
    decision = decided(fedround, seen, at)
    assert ready(decision).reason == reason
    assert ready(decision).status == "False"
    assert started(decision) == starts


WITHDRAWN = [
    ("Suspended", {"suspend": True}),
    ("ConsentMissing", {"consent": {"hubs": [{"namespace": "other"}], "expires": "2030-01-01T00:00:00Z"}}),
    ("ConsentExpired", {"consent": {"hubs": [{"namespace": "hub"}], "expires": T0.isoformat()}}),
]


@pytest.mark.parametrize(("reason", "spec"), WITHDRAWN)
def test_who_withdraws_while_training_is_stopped(reason: str, spec: dict[str, Any]) -> None:
    running = {nn("a"): attempts("a", JobState.RUNNING)}
    seen = of(HALF, "a", "b", training=running)
    withdrawn = {**seen.clients, nn("a"): a_client("a", **spec)}
    decision = decided(
        HALF, ObservedRound(plan=seen.plan, clients=withdrawn, reserved=seen.reserved, training=running)
    )
    assert [deletion.uid for deletion in decision.delete] == [a_job("a", names.TRAIN, JobState.RUNNING).uid]
    assert [f.reason for f in decision.status.failed_clients] == [reason]


EXCLUDED = [
    *WITHDRAWN,
    (
        "RoundEpsilonTooLarge",
        {"privacy": {**a_client().spec.privacy.to_json_object(), "maxRoundEpsilon": "0.5"}},
    ),
    (
        "DeltaTooLarge",
        {
            "privacy": {
                **a_client().spec.privacy.to_json_object(),
                "budget": {"epsilon": "8", "delta": "1e-7"},
            }
        },
    ),
    ("ImageNotAllowed", {"worker": {"allowedImages": ["other@sha256:" + "0" * 64]}}),
    ("BatchTooLarge", {"data": {"numExamples": 63}}),
]


@pytest.mark.parametrize(("reason", "spec"), EXCLUDED)
def test_who_is_not_eligible_is_excluded_with_a_reason(reason: str, spec: dict[str, Any]) -> None:
    seen = ObservedRound(selection=a_selection(a_client("a", **spec), a_client("b")))
    decision = decided(a_round(), seen)
    assert [(f.client, f.reason) for f in decision.status.failed_clients] == [("a/a", reason)]
    (record,) = decision.record
    assert isinstance(record, PutRecord)
    assert [p.client for p in record.body.cohort] == [nn("b")]


@pytest.mark.parametrize(
    ("task", "expected"), [("SequenceClassification", ["LabelFieldMissing"]), ("CausalLM", [])]
)
def test_a_classifier_is_not_trained_on_records_without_labels(task: str, expected: list[str]) -> None:
    labelled = a_client("b", data={"labelField": "label"})
    seen = ObservedRound(selection=a_selection(a_client("a"), labelled))
    decision = decided(a_round(task=task), seen)
    assert [f.reason for f in decision.status.failed_clients] == expected


B = Candidate(a_client("b"))


@pytest.mark.parametrize(
    ("reason", "facts"),
    [
        ("NoAccess", {"candidates": (Candidate(a_client("a"), access_problem="no"), B)}),
        ("OverlappingData", {"candidates": (Candidate(a_client("a"), data_overlaps="x"), B)}),
        ("BudgetExceeded", {"budget_problems": {nn("a"): failure(nn("a"), "BudgetExceeded", "")}}),
        ("NoiseUnsolvable", {"unsolvable": {900: "no"}, "candidates": (
            Candidate(a_client("a", data={"numExamples": 900})), B)}),
    ],
)  # fmt: skip
def test_what_was_seen_excludes_too(reason: str, facts: dict[str, Any]) -> None:
    decision = decided(a_round(), ObservedRound(selection=a_selection(a_client("a"), a_client("b"), **facts)))
    assert [(f.client, f.reason) for f in decision.status.failed_clients] == [("a/a", reason)]


@pytest.mark.parametrize("job_state", [None, JobState.RUNNING])
def test_a_refusal_that_may_pass_costs_the_round_nothing(job_state: JobState | None) -> None:
    training = {nn("a"): attempts("a", job_state)} if job_state else {}
    denied = {"a": Denied(T0, Forbidden("no"))}
    decision = decided(a_round(), replace(planned("a", "b", training=training), denied=denied))
    assert ready(decision).reason == "Training"
    assert started(decision) == [job(a_round(), "b")], "nobody knows whether a worker of a runs"
    assert decision.status.failed_clients == []


def test_a_refusal_that_lasts_costs_the_round_the_client() -> None:
    denied = {"a": Denied(T0 - ACCESS_LOST_AFTER, Forbidden("no"))}
    running = {nn("a"): attempts("a", JobState.RUNNING)}
    decision = decided(HALF, replace(of(HALF, "a", "b", training=running), denied=denied))
    assert [(f.client, f.reason) for f in decision.status.failed_clients] == [("a/a", "NoAccess")]
    assert decision.delete == (), "what may not be read may not be deleted"


@pytest.mark.parametrize(
    ("seen", "passed", "at"),
    [
        (ObservedRound(selection=a_selection(a_client("a"))), None, "Planned"),
        (AB, "BudgetReserved", "Trained"),
        (DELIVERED, "Trained", "Aggregated"),
    ],
)
def test_a_suspended_round_says_how_far_it_is(seen: ObservedRound, passed: str | None, at: str) -> None:
    decision = decided(a_round(suspend=True), seen)
    flags = {c.type: (c.status, c.reason) for c in decision.status.conditions}
    assert passed is None or flags[passed][0] == "True"
    assert flags[at] == ("False", "Suspended")


def test_a_failed_round_records_its_outcome_before_it_says_so() -> None:
    decision = decided(a_round(), AB, LATER)
    (record,) = decision.record
    assert isinstance(record.body, RoundOutcome)
    assert record.body.outcome is OutcomeKind.FAILED
    assert not started(decision)


def finished(seen: ObservedRound, kind: OutcomeKind, submitted: list[Any]) -> ObservedRound:
    outcome = RoundOutcome(
        run_key=seen.plan.run_key,
        round=seen.plan.round,
        outcome=kind,
        reason="RoundComplete" if kind is OutcomeKind.COMPLETE else "QuorumLost",
        model=NEW if kind is OutcomeKind.COMPLETE else None,
        submitted=submitted,
        finished_at=T0,
    )
    return ObservedRound(outcome=outcome, plan=seen.plan, deltas=seen.deltas, training=seen.training)


def test_after_the_outcome_who_delivered_is_settled_and_the_rest_released() -> None:
    seen = finished(of(HALF, "a", "b", delivered=("a",)), OutcomeKind.COMPLETE, [nn("a")])
    kinds = {r.planned.client.name: r.kind for r in decided(HALF, seen).record if isinstance(r, LedgerRecord)}
    assert kinds == {"a": LedgerKind.SETTLE, "b": LedgerKind.RELEASE}


@pytest.mark.parametrize("kind", list(OutcomeKind))
def test_a_finished_round_says_so_in_terms_of_kstatus(kind: OutcomeKind) -> None:
    decision = decided(a_round(), finished(DELIVERED, kind, [nn("a"), nn("b")]))
    flags = {c.type: c.status for c in decision.status.conditions}
    complete = kind is OutcomeKind.COMPLETE
    assert flags["Ready"] == flags["Complete"] == ("True" if complete else "False")
    assert flags["Stalled"] == flags["Failed"] == ("False" if complete else "True")
    assert flags["Reconciling"] == "False"


def test_stragglers_are_stopped_and_old_children_removed() -> None:
    running = of(HALF, "a", "b", delivered=("a",), training={nn("b"): attempts("b", JobState.RUNNING)})
    done = of(HALF, "a", "b", delivered=("a",), training={nn("b"): attempts("b", JobState.SUCCEEDED)})
    at_the_deadline = decided(HALF, running, LATER)
    assert [d.namespace for d in at_the_deadline.delete] == ["b"]
    complete = finished(done, OutcomeKind.COMPLETE, [nn("a")])
    assert not decided(HALF, complete, T0 + timedelta(hours=1)).delete
    assert [d.namespace for d in decided(HALF, complete, T0 + timedelta(days=1)).delete] == ["b"]


def test_metrics_name_the_baseline_and_the_new_model() -> None:
    seen = of(PUBLIC, "a", delivered=("a",), aggregate=an_aggregate(AB.plan, [nn("a")]), report=a_report())
    status = decided(PUBLIC, seen).status
    values = {m.name: m.value for m in status.metrics}
    assert (values["baselineLoss"], values["loss"]) == ("2.5", "2.25")
    assert status.base_model == BASE
    assert status.privacy.noise_multiplier == "0.8"
    assert status.clients_summary == "1/1"


def test_the_status_says_how_far_the_aggregation_is() -> None:
    """A pod that has not said anything yet has as much before it as the other."""
    two_pods = a_round(aggregation={"parallelism": 2})
    running = attempts("hub", JobState.RUNNING, stage=names.AGGREGATE)
    mark = ProgressMark(bytes_done=60, bytes_total=100, bytes_per_second=5_000_000)
    seen = of(two_pods, "a", delivered=("a",), aggregation=running, progress=(mark,))
    decision = decided(two_pods, seen)
    assert decision.status.aggregation is not None
    assert (decision.status.aggregation.percent, decision.status.aggregation.megabytes_per_second) == (30, 5)
    assert decision.poll_after is not None
    assert decision.poll_after <= timedelta(seconds=10)
    made = of(two_pods, "a", delivered=("a",), aggregate=an_aggregate(AB.plan, [nn("a")]))
    after = decided(two_pods, made).status.aggregation
    assert after is not None
    assert (after.percent, after.delta_bytes, after.bytes_written) == (100, 1, 1)


def test_a_gang_gets_its_meeting_point_before_its_job() -> None:
    gang = [a_client("a", worker={"allowedImages": a_client().spec.worker.allowed_images, "nodes": 2})]
    plan = a_plan(a_round(), gang)
    seen = ObservedRound(plan=plan, clients={nn("a"): gang[0]}, reserved=frozenset({nn("a")}))
    assert [child.kind for child in decided(a_round(), seen).apply] == ["Service", "Job"]
    pending = ObservedRound(
        plan=plan,
        clients={nn("a"): gang[0]},
        reserved=frozenset({nn("a")}),
        training={nn("a"): attempts("a", JobState.PENDING)},
    )
    (service,) = decided(a_round(), pending).apply
    assert [o.uid for o in service.metadata.owner_references] == ["uid-a-train-0"]

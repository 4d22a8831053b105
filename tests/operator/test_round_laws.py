"""Laws of the round's ladder, over random worlds."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from round_worlds import (
    CRASH,
    EMPTY,
    EVALUATION,
    T0,
    a_client,
    a_delta,
    a_plan,
    a_report,
    a_round,
    a_selection,
    after,
    an_aggregate,
    attempts,
    decided,
    nn,
)

from tributary_api.records import LedgerKind, OutcomeKind, RoundOutcome
from tributary_operator import names
from tributary_operator.api import Forbidden
from tributary_operator.decision import LedgerRecord
from tributary_operator.jobs import Denied, JobState
from tributary_operator.rounds.observed import ObservedRound

CLIENTS = ["a", "b", "c"]
OBJECTS = {nn(name): a_client(name) for name in CLIENTS}
PASSES_MAX = 40

states = st.lists(st.sampled_from([JobState.FAILED, JobState.SUCCEEDED]), max_size=2)
last = st.sampled_from([None, JobState.PENDING, JobState.RUNNING, JobState.STOPPING])


@st.composite
def rounds(draw: Any) -> Any:
    return a_round(
        clients={"minAvailable": draw(st.sampled_from(["100%", "50%", 1, 2, 3]))},
        clientBackoffLimit=draw(st.integers(0, 3)),
        **draw(st.sampled_from([{}, {"evaluation": EVALUATION}])),
    )


@st.composite
def worlds(draw: Any, fedround: Any) -> ObservedRound:
    plan = a_plan(fedround, OBJECTS.values())
    members = st.sets(st.sampled_from(CLIENTS))
    delivered = draw(members)
    training = {}
    for name in CLIENTS:
        ended, active = draw(states), draw(last)
        failure = draw(st.sampled_from([CRASH, EMPTY])) if ended else None
        training[nn(name)] = attempts(name, *ended, *([active] if active else []), failure=failure)
    made = draw(st.booleans()) and bool(delivered)
    return ObservedRound(
        plan=plan,
        clients={client: OBJECTS[client] for client in map(nn, draw(members))},
        reserved=frozenset(map(nn, draw(members) | delivered)),
        training=training,
        deltas={nn(name): a_delta(plan, name) for name in delivered},
        aggregate=an_aggregate(plan, sorted(map(nn, delivered), key=str)) if made else None,
        report=a_report() if made and draw(st.booleans()) else None,
        denied={name: Denied(T0, Forbidden("no")) for name in draw(members)},
    )


situations = rounds().flatmap(
    lambda r: st.tuples(st.just(r), worlds(r), st.timedeltas(timedelta(0), timedelta(hours=3)))
)


@settings(max_examples=300)
@given(situations)
def test_in_any_world(case: Any) -> None:
    fedround, seen, elapsed = case
    decision = decided(fedround, seen, T0 + elapsed)
    jobs = [child for child in decision.apply if child.kind == "Job"]
    trained = {nn(job.metadata.namespace) for job in jobs if names.CLIENT in job.metadata.labels}
    running = {client for client, found in seen.training.items() if found.active is not None}
    assert not trained & running, "two workers of one client at once"
    assert not trained & seen.deltas.keys(), "a delivered delta must never be computed again"
    assert trained <= seen.reserved, "nobody starts before the budget is set aside"
    assert trained <= seen.clients.keys(), "nobody starts without a FederatedClient"
    assert not {client.namespace for client in trained} & seen.denied.keys(), "nobody starts unseen"
    assert not {deletion.namespace for deletion in decision.delete} & seen.denied.keys()
    assert not (jobs and seen.aggregate is not None and trained), "no training once the model exists"
    existing = {(job.namespace, job.name) for found in seen.training.values() for job in found.jobs}
    assert not {(job.metadata.namespace, job.metadata.name) for job in jobs} & existing


@settings(max_examples=100)
@given(situations)
def test_deciding_twice_changes_nothing(case: Any) -> None:
    fedround, seen, elapsed = case
    once = decided(fedround, seen, T0 + elapsed)
    again = decided(fedround.model_copy(update={"status": once.status}), seen, T0 + elapsed)
    assert again.status == once.status
    assert (again.apply, again.delete, again.record) == (once.apply, once.delete, once.record)
    assert again.events == ()


@given(situations, st.sampled_from(list(OutcomeKind)), st.booleans())
def test_nothing_starts_after_an_outcome(case: Any, kind: OutcomeKind, suspend: bool) -> None:
    fedround, seen, elapsed = case
    fedround = fedround.model_copy(update={"spec": fedround.spec.model_copy(update={"suspend": suspend})})
    outcome = RoundOutcome(
        run_key=seen.plan.run_key, round=seen.plan.round, outcome=kind, reason="Over", finished_at=T0
    )
    decision = decided(fedround, replace(seen, outcome=outcome), T0 + elapsed)
    assert decision.apply == ()
    assert all(isinstance(record, LedgerRecord) for record in decision.record)


@given(situations)
def test_suspending_stops_everything_and_starts_nothing(case: Any) -> None:
    fedround, seen, elapsed = case
    fedround = fedround.model_copy(update={"spec": fedround.spec.model_copy(update={"suspend": True})})
    decision = decided(fedround, seen, T0 + elapsed)
    stoppable = {job.uid for found in seen.training.values() for job in found.jobs if job.state in
                 {JobState.PENDING, JobState.RUNNING} and job.namespace not in seen.denied}  # fmt: skip
    assert {deletion.uid for deletion in decision.delete} == stoppable
    assert (decision.apply, decision.record) == ((), ())


def reservations(decision: Any) -> list[Any]:
    return [r for r in decision.record if isinstance(r, LedgerRecord) and r.kind is LedgerKind.RESERVE]


def run_to_the_end(fedround: Any, seen: ObservedRound) -> ObservedRound:
    """Carry out what is decided in a world without faults until nothing is decided any more."""
    for i in range(PASSES_MAX):
        decision = decided(fedround, seen, T0 + timedelta(seconds=i))
        shown = fedround.status.privacy.noise_multiplier
        assert shown or not reservations(decision), "reserved before the status showed what it costs"
        fedround = fedround.model_copy(update={"status": decision.status})
        if seen.outcome is not None and not (decision.record or decision.apply or decision.delete):
            return seen
        seen = after(seen, decision)
    raise AssertionError(f"not at the end after {PASSES_MAX} passes: {decision.status.conditions}")


@settings(max_examples=150)
@given(rounds(), st.data())
def test_from_any_world_the_end_is_reached_and_then_nothing_is_done(fedround: Any, data: Any) -> None:
    seen = replace(data.draw(worlds(fedround)), clients=dict(OBJECTS), denied={})
    end = run_to_the_end(fedround, seen)
    assert end.outcome is not None
    assert end.closed == {nn(name) for name in CLIENTS}


def test_a_new_round_reaches_its_goal() -> None:
    fedround = a_round(evaluation=EVALUATION)
    end = run_to_the_end(fedround, ObservedRound(selection=a_selection(*OBJECTS.values())))
    assert end.outcome is not None
    assert end.outcome.outcome is OutcomeKind.COMPLETE
    assert end.outcome.submitted == [nn(name) for name in CLIENTS]


@pytest.mark.parametrize("attempt", [0, 1, 9])
@pytest.mark.parametrize("length", [1, 20, 63])
def test_names_fit_and_tell_apart(attempt: int, length: int) -> None:
    one = a_round().model_copy(
        update={"metadata": a_round().metadata.model_copy(update={"name": "r" * length})}
    )
    client, other = nn("c" * length), nn("c" * (length - 1) + "d")
    name = names.train_job(one, client, attempt)
    assert len(name) + names.INDEX_LENGTH <= names.NAME_LENGTH_MAX
    assert name != names.train_job(one, other, attempt)
    assert name != names.train_job(one, client, attempt + 1)

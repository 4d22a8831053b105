"""Rows of the release's ladder: what is seen, and what is then done and said."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from release_worlds import (
    ANALYSIS_SECONDS,
    DELAY_SECONDS,
    INT8,
    T0,
    World,
    a_model,
    a_release,
    condition,
    reason,
    serving,
)

from tributary_operator import conditions, names
from tributary_operator.decision import JsonPatch
from tributary_operator.jobs import JobState
from tributary_operator.releases.children import SELECTED

LADDER = ["Compressing", "Gating", "CandidateStarting", "Promoting", "Watching", "Serving"]
GIVE_UP = 3
"""One attempt and the default of two more."""


def rejecting() -> World:
    """A world in which m1 serves and m2 has just failed its gate."""
    world = serving()
    world.ask_for(model="m2")
    world.run_pass()
    world.succeed()
    world.run_pass()
    world.end_job(world.jobs[-1], succeeds=True, verdict="FAIL")
    world.run_pass()
    return world


def is_ready(world: World) -> bool:
    return conditions.is_true(world.release.status.conditions, conditions.READY)


def is_stalled(world: World) -> bool:
    return conditions.is_true(world.release.status.conditions, conditions.STALLED)


def steps_of(world: World, passes_max: int = 60) -> list[str]:
    """Reasons in their order, each once, while everything succeeds."""
    seen: list[str] = []
    for _ in range(passes_max):
        world.run_pass()
        if not seen or seen[-1] != reason(world):
            seen.append(reason(world))
        if seen[-1] == "Serving":
            return seen
        world.succeed()
        world.now += timedelta(seconds=1)
    return seen


def test_a_first_release_climbs_the_ladder() -> None:
    world = World(a_release())
    assert steps_of(world) == LADDER
    stable = world.release.status.stable
    assert stable is not None
    assert (stable.bytes, stable.parent_bytes) == (100, 400)
    assert stable.parent == a_model("m1")
    assert {("loss", "3.25"), ("parentLoss", "3.24")} <= {(m.name, m.value) for m in stable.metrics}
    assert world.service is not None
    assert world.service.revision == stable.revision
    assert world.has_budget
    assert world.release.status.candidate is None


def test_without_compression_the_model_itself_is_served() -> None:
    world = serving(compression=[])
    assert [job.stage for job in world.jobs] == ["gate"]
    assert world.release.status.stable.model == a_model("m1")
    assert world.release.status.stable.bytes == world.release.status.stable.parent_bytes == 400


def test_the_first_release_is_compared_with_its_parent_alone() -> None:
    world = World(a_release())
    world.settle()
    (gate,) = [json.loads(world.tasks[job.name]) for job in world.jobs if job.stage == "gate"]
    assert "stable" not in gate
    assert gate["parent"] == a_model("m1").to_json_object()


def test_a_second_model_replaces_the_first_and_the_first_is_kept_for_a_while() -> None:
    world = serving()
    old = world.service.revision
    world.ask_for(model="m2")
    assert steps_of(world) == LADDER
    new = world.service.revision
    assert new != old
    assert set(world.deployments) == {old, new}, "going back must not start a pod"
    assert [r.revision for r in world.release.status.history] == [old]
    world.now += timedelta(seconds=DELAY_SECONDS)
    world.settle()
    assert set(world.deployments) == {new}
    gates = [json.loads(world.tasks[job.name]) for job in world.jobs if job.stage == "gate"]
    assert gates[1]["stable"] == world.release.status.history[0].model.to_json_object()


def test_the_stable_revision_stays_ready_while_a_candidate_is_on_its_way() -> None:
    world = serving()
    world.ask_for(model="m2")
    world.run_pass()
    assert is_ready(world)
    assert reason(world) == "Compressing"
    assert not is_stalled(world)


def test_intent_is_recorded_before_the_service_changes() -> None:
    world = serving()
    old = world.service.revision
    world.ask_for(model="m2")
    while world.release.status.transition.to_revision == old:
        assert world.service.revision == old
        world.run_pass()
        world.succeed()
    intent = world.release.status.transition
    assert (intent.from_revision, intent.switched_at) == (old, None)
    assert world.service.revision == old
    decision = world.run_pass()
    (patch,) = [child for child in decision.apply if isinstance(child, JsonPatch)]
    assert patch.operations == (
        {"op": "test", "path": SELECTED, "value": old},
        {"op": "replace", "path": SELECTED, "value": intent.to_revision},
    )


@pytest.mark.parametrize("verdict", ["FAIL", "INCONCLUSIVE"])
def test_a_failed_gate_leaves_the_stable_revision_and_does_not_loop(verdict: str) -> None:
    world = serving()
    old = world.service.revision
    world.ask_for(model="m2")
    world.run_pass()
    world.succeed()
    world.run_pass()
    world.end_job(world.jobs[-1], succeeds=True, verdict=verdict)
    for _ in range(5):
        world.run_pass()
        world.now += timedelta(hours=1)
        assert (is_ready(world), is_stalled(world), reason(world)) == (True, True, "Worse")
    assert world.service.revision == old
    assert set(world.deployments) == {old}
    (rejected,) = world.release.status.rejected_revisions
    assert rejected.stable == old
    assert condition(world, "GatePassed").status == "False"


def test_a_first_model_that_fails_its_gate_is_not_ready_and_has_no_service() -> None:
    world = World(a_release(compression=[]))
    world.run_pass()
    world.end_job(world.jobs[-1], succeeds=True, verdict="FAIL")
    world.run_pass()
    assert (is_ready(world), is_stalled(world), world.service) == (False, True, None)


def test_a_changed_gate_gives_a_rejected_model_another_chance() -> None:
    world = rejecting()
    gate = a_release().spec.gate.to_json_object() | {"metrics": [{"margin": "0.5"}]}
    world.ask_for(gate=gate)
    assert steps_of(world)[-1] == "Serving"
    assert not is_stalled(world)


@pytest.mark.parametrize("change", [{"replicas": 3}, {"serviceName": "helper"}, {"port": 8000}])
def test_scaling_or_renaming_gives_a_rejected_model_no_other_chance(change: Any) -> None:
    world = rejecting()
    (rejected,) = world.release.status.rejected_revisions
    world.ask_for(model="m2", serving=change)
    assert world.situation().rejection == rejected


def test_going_back_to_the_old_model_after_a_rejection_is_settled_at_once() -> None:
    world = rejecting()
    jobs = world.jobs_created
    world.ask_for(model="m1")
    assert steps_of(world) == ["Serving"]
    assert (is_stalled(world), world.jobs_created) == (False, jobs)


def test_a_job_that_fails_is_tried_again_and_then_given_up() -> None:
    world = World(a_release())
    for _ in range(GIVE_UP):
        world.run_pass()
        active = [job for job in world.jobs if job.is_active]
        world.end_job(active[0], succeeds=False)
    world.run_pass()
    assert [job.attempt for job in world.jobs] == [0, 1, 2]
    assert (is_stalled(world), reason(world)) == (True, "InternalError")
    world.run_pass()
    assert len(world.jobs) == GIVE_UP


def test_a_candidate_that_does_not_start_is_rejected_and_its_pods_go() -> None:
    world = serving()
    old = world.service.revision
    world.ask_for(model="m2")
    while len(world.deployments) == 1:
        world.run_pass()
        world.succeed()
    (new,) = set(world.deployments) - {old}
    world.deployments[new].ready = 1
    world.deployments[new].problem = "ProgressDeadlineExceeded: too slow"
    for _ in range(3):
        world.run_pass()
    assert set(world.deployments) == {old}
    assert (is_ready(world), is_stalled(world), reason(world)) == (True, True, "CandidateUnavailable")


def test_a_revision_that_loses_pods_while_it_is_watched_is_switched_away_from() -> None:
    world = serving()
    old = world.service.revision
    world.ask_for(model="m2")
    while world.service.revision == old:
        world.run_pass()
        world.succeed()
    new, pods = world.service.revision, world.started_pods
    world.run_pass()
    world.lose_pod(new)
    world.run_pass()
    assert world.service.revision == new, "the intent to go back is recorded first"
    world.run_pass()
    assert world.service.revision == old
    assert world.started_pods == pods, "the old pods were kept warm"
    world.run_pass()
    world.now += timedelta(seconds=ANALYSIS_SECONDS + DELAY_SECONDS)
    world.run_pass()
    world.run_pass()
    assert (is_ready(world), is_stalled(world), reason(world)) == (True, True, "AnalysisFailed")
    assert set(world.deployments) == {old}


def test_pods_lost_after_the_analysis_do_not_switch_back() -> None:
    world = serving()
    new = world.service.revision
    world.lose_pod(new)
    world.run_pass()
    assert world.service.revision == new
    assert is_ready(world)


def test_manual_promotion_waits_until_the_revision_is_named() -> None:
    world = World(a_release(strategy={"promotion": "Manual"}))
    for _ in range(10):
        world.run_pass()
        world.succeed()
    assert (reason(world), world.service) == ("AwaitingPromotion", None)
    revision = world.release.status.candidate.revision
    world.ask_for(strategy={"promotion": "Manual", "promotedRevision": revision})
    world.settle()
    assert world.service.revision == revision


def test_going_back_by_name_starts_no_pod_and_no_job() -> None:
    world = World(a_release(strategy={"promotion": "Manual"}))
    old = promote_by_hand(world)
    world.ask_for(model="m2", strategy={"promotion": "Manual", "promotedRevision": old})
    new = promote_by_hand(world)
    pods, jobs = world.started_pods, world.jobs_created
    world.ask_for(model="m2", strategy={"promotion": "Manual", "promotedRevision": old})
    world.run_pass()
    world.run_pass()
    assert world.service.revision == old
    assert (world.started_pods, world.jobs_created) == (pods, jobs)
    assert new in world.deployments


def promote_by_hand(world: World) -> str:
    for _ in range(20):
        world.run_pass()
        world.succeed()
        world.now += timedelta(seconds=1)
    revision = world.release.status.candidate.revision
    model = world.release.spec.model.uri.rsplit("/", 1)[-1]
    world.ask_for(model=model, strategy={"promotion": "Manual", "promotedRevision": revision})
    for _ in range(20):
        world.run_pass()
        world.now += timedelta(seconds=1)
    assert world.service.revision == revision
    return revision


def test_going_back_by_model_reuses_the_warm_revision_without_a_gate() -> None:
    world = serving()
    old = world.service.revision
    world.ask_for(model="m2")
    steps_of(world)
    pods, jobs = world.started_pods, world.jobs_created
    world.ask_for(model="m1")
    world.run_pass()
    world.run_pass()
    assert world.service.revision == old
    assert (world.started_pods, world.jobs_created) == (pods, jobs)


def test_going_back_does_not_wait_for_the_analysis() -> None:
    world = serving(strategy={"scaleDownDelaySeconds": 3600, "postPromotion": {"analysisSeconds": 3600}})
    old = world.service.revision
    world.ask_for(model="m2")
    while world.service.revision == old:
        world.run_pass()
        world.succeed()
    world.run_pass()
    assert reason(world) == "Watching"
    world.ask_for(model="m1")
    world.run_pass()
    world.run_pass()
    assert world.service.revision == old


def test_scaling_changes_the_number_of_pods_and_no_revision() -> None:
    world = serving()
    revision, jobs = world.service.revision, world.jobs_created
    world.ask_for(serving={"replicas": 5})
    world.settle()
    assert world.deployments[revision].replicas == 5
    assert (set(world.deployments), world.jobs_created) == ({revision}, jobs)


def test_a_candidate_is_scaled_before_it_is_switched_to() -> None:
    world = serving()
    world.ask_for(model="m2", serving={"replicas": 3})
    world.settle()
    assert world.deployments[world.service.revision].replicas == 3


@pytest.mark.parametrize(
    "changes",
    [{"serving": {"resources": {"limits": {"memory": "2Gi"}}}}, {"compression": []}, {"model": "m2"}],
)
def test_whatever_changes_the_pods_is_a_new_revision(changes: Any) -> None:
    world = serving()
    old = world.service.revision
    world.ask_for(**changes)
    world.settle()
    assert world.service.revision != old


@pytest.mark.parametrize("serving_change", [{"replicas": 3}, {"port": 8000}])
def test_what_does_not_change_the_pods_is_none(serving_change: Any) -> None:
    one, other = World(a_release()), World(a_release(serving=serving_change))
    assert one.situation().target == other.situation().target


def test_a_renamed_service_is_made_before_the_old_one_goes() -> None:
    world = serving()
    stable = world.service.revision
    world.ask_for(serving={"serviceName": "helper"})
    world.service = None  # there is none of that name yet
    decision = world.run_pass()
    assert [child.metadata.name for child in decision.apply] == ["helper"]
    assert world.service.revision == stable


def test_the_port_of_the_service_follows_the_spec() -> None:
    world = serving()
    world.ask_for(serving={"port": 8000})
    world.settle()
    assert world.service.port == 8000


def test_a_service_that_somebody_else_switched_is_switched_back() -> None:
    world = serving()
    stable = world.service.revision
    world.service = replace(world.service, revision="elsewhere")
    world.run_pass()
    assert world.service.revision == stable


def test_a_service_of_somebody_else_is_left_alone() -> None:
    other = replace(serving().service, is_ours=False, revision="")
    world = World(a_release(), service=other)
    world.settle()
    assert world.service == other
    assert (is_stalled(world), reason(world)) == (True, "ServiceTaken")


def test_an_unknown_model_leaves_what_serves() -> None:
    world = serving()
    old = set(world.deployments)
    world.ask_for(model="m2")
    world.is_model_known = False
    world.run_pass()
    assert (is_ready(world), reason(world), set(world.deployments)) == (True, "BaseRoundPending", old)


def test_a_candidate_nobody_asks_for_any_more_goes() -> None:
    world = serving()
    old = world.service.revision
    world.ask_for(model="m2")
    while len(world.deployments) == 1:
        world.run_pass()
        world.succeed()
    world.ask_for(model="m1")
    world.run_pass()
    assert set(world.deployments) == {old}
    assert world.release.status.candidate is None


def test_an_intended_switch_that_nobody_asks_for_any_more_is_forgotten() -> None:
    world = serving()
    stable = world.service.revision
    world.ask_for(model="m2")
    while world.release.status.transition.to_revision == stable:
        world.run_pass()
        world.succeed()
    assert world.release.status.transition.switched_at is None
    world.ask_for(model="m1", serving={"replicas": 5})
    world.settle()
    assert world.release.status.transition is None
    assert world.service.revision == stable
    assert {name: d.replicas for name, d in world.deployments.items()} == {stable: 5}


def test_events_tell_each_step_once() -> None:
    world = World(a_release())
    told = []
    for _ in range(30):
        told += [event.reason for event in world.run_pass().events]
        world.succeed()
        world.now += timedelta(seconds=1)
    # What serves is told as soon as it does, what is done next right after.
    assert told == LADDER


def test_nothing_to_do_costs_no_write() -> None:
    world = serving()
    decision = world.run_pass()
    assert (decision.apply, decision.delete, decision.events) == ((), (), ())
    assert decision.status == world.release.status


def test_compression_is_named_by_its_inputs_and_shared_between_releases() -> None:
    world = World(a_release(compression=[INT8]))
    world.run_pass()
    (job,) = world.jobs
    assert job.state is JobState.PENDING
    assert job.labels[names.RECORD] in json.loads(world.tasks[job.name])["manifestUri"]
    assert world.now == T0

"""Laws of the release's ladder, where users, pods, Jobs and the operator's death come in any order.

The world itself raises when the Service would select pods that are not all available, or lose those that it
selects, when a Job is created twice, or when a patch that lost a race would go through.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from release_worlds import DELAY_SECONDS, BrokenPromise, World, a_release

from tributary_api.release import ModelReleaseStatus
from tributary_operator import conditions, names
from tributary_operator.releases import steps
from tributary_operator.releases.decide import decide

MODELS = ["m1", "m2", "m3"]
ACTIONS_MAX = 4


class Releases(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World(a_release())
        self.served = False

    @rule(actions_max=st.none() | st.integers(0, ACTIONS_MAX))
    def the_operator_looks(self, actions_max: int | None) -> None:
        """And is killed after some of its writes, or not."""
        self.world.run_pass(actions_max)

    @rule()
    def all_goes_well(self) -> None:
        self.world.succeed()
        self.world.run_pass()

    @rule(seconds=st.sampled_from([1, 10, DELAY_SECONDS, 3600]))
    def time_passes(self, seconds: int) -> None:
        self.world.now += timedelta(seconds=seconds)

    @rule(data=st.data(), verdict=st.sampled_from(["PASS", "FAIL", "INCONCLUSIVE", None]))
    def a_job_ends(self, data: Any, verdict: str | None) -> None:
        active = [job for job in self.world.jobs if job.is_active]
        if active:
            job = data.draw(st.sampled_from(active))
            self.world.end_job(job, succeeds=verdict is not None, verdict=verdict or "PASS")

    @rule(data=st.data())
    def a_pod_gets_ready(self, data: Any) -> None:
        if self.world.deployments:
            found = self.world.deployments[data.draw(st.sampled_from(sorted(self.world.deployments)))]
            found.ready = min(found.replicas, found.ready + 1)

    @rule(data=st.data())
    def a_pod_is_lost(self, data: Any) -> None:
        if self.world.deployments:
            self.world.lose_pod(data.draw(st.sampled_from(sorted(self.world.deployments))))

    @rule(data=st.data())
    def kubernetes_gives_up(self, data: Any) -> None:
        starting = [name for name, d in self.world.deployments.items() if d.ready < d.replicas]
        if starting:
            self.world.deployments[data.draw(st.sampled_from(starting))].problem = "ProgressDeadlineExceeded"

    @rule(
        model=st.sampled_from(MODELS),
        replicas=st.integers(1, 3),
        promotion=st.sampled_from(["Automatic", "Manual"]),
        data=st.data(),
    )
    def the_user_changes_the_spec(self, model: str, replicas: int, promotion: str, data: Any) -> None:
        promoted = data.draw(st.sampled_from(["", "nonsense", *sorted(self.world.deployments)]))
        strategy = {"promotion": promotion, "promotedRevision": promoted}
        self.world.ask_for(model=model, serving={"replicas": replicas}, strategy=strategy)

    @rule(known=st.booleans())
    def the_model_is_known(self, known: bool) -> None:
        self.world.is_model_known = known

    @invariant()
    def once_opened_the_service_stays(self) -> None:
        self.served = self.served or self.world.service is not None
        assert not self.served or self.world.service is not None

    @invariant()
    def the_service_selects_pods_that_exist(self) -> None:
        service = self.world.service
        assert service is None or service.revision in self.world.deployments

    @invariant()
    def deciding_twice_changes_nothing(self) -> None:
        once = decide(self.world.situation())
        if once.apply or once.delete:
            return
        status = self.world.release.status
        self.world.release = self.world.release.model_copy(update={"status": once.status})
        again = decide(self.world.situation())
        self.world.release = self.world.release.model_copy(update={"status": status})
        # Intent, rejection and generation are facts that the next pass goes on from.
        settled = _facts(once.status) == _facts(status)
        if settled:
            assert (again.apply, again.delete, again.events) == ((), (), ())
            assert again.status == once.status

    @invariant()
    def at_most_one_job_runs(self) -> None:
        by_key = [job.labels[names.RECORD] for job in self.world.jobs if job.is_active]
        assert len(by_key) == len(set(by_key))

    def teardown(self) -> None:
        """Whatever has happened: with a sound spec and no more faults the release gets where it should."""
        self.world.is_model_known = True
        for found in self.world.deployments.values():
            found.problem = ""
        self.world.ask_for(model="final", serving={"replicas": 2})
        self.world.settle(passes_max=200)
        self.world.now += timedelta(seconds=DELAY_SECONDS)
        self.world.settle(passes_max=20)
        status = self.world.release.status
        assert conditions.is_true(status.conditions, conditions.READY)
        assert not conditions.is_true(status.conditions, conditions.RECONCILING), status.conditions
        assert not conditions.is_true(status.conditions, conditions.STALLED), status.conditions
        assert set(self.world.deployments) == {self.world.service.revision} == {status.stable.revision}
        assert self.world.service.revision == self.world.situation().target


def _facts(status: ModelReleaseStatus) -> Any:
    return status.transition, status.rejected_revisions, status.observed_generation


# Not shrunk: a failing run is short enough to read, and shrinking takes minutes.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
Releases.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, phases=PHASES)
TestReleases = Releases.TestCase


def test_the_world_notices_a_switch_to_pods_that_are_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """The laws can fail: without the step that waits for the candidate's pods the promise breaks."""
    monkeypatch.setattr("tributary_operator.releases.situation.Situation.is_available", lambda s, name: True)
    monkeypatch.setattr(steps, "_warm_up", lambda s, found: steps.Done())
    world = World(a_release(compression=[]))
    world.run_pass()
    world.succeed()
    world.run_pass()  # starts the candidate
    world.run_pass()  # intends to switch
    with pytest.raises(BrokenPromise):
        world.run_pass()

from __future__ import annotations

import pytest
import training_worlds as worlds
from hypothesis import given
from hypothesis import strategies as st

from tributary_api.failures import Reason
from tributary_api.shared import ModelRef
from tributary_api.tasks import RENDEZVOUS_PORT
from tributary_worker.distributed import LOOPBACK, POD_INDEX_ENV, RankLayout, on_first_rank, pod_layouts
from tributary_worker.failures import StageFailure

HOST = "job-0.job.clinic-a.svc"
TASK = worlds.train_task(
    ModelRef(uri="s3://exchange/models/0", digest="sha256:" + "0" * 64), worlds.client_object()
)


def task(nodes, processes, host=HOST):
    update = {"nodes": nodes, "processes_per_node": processes, "rendezvous_host": host if nodes > 1 else ""}
    return TASK.model_copy(update=update)


@given(st.integers(1, 5), st.integers(1, 4))
def test_the_pods_of_a_job_make_up_one_world(nodes, processes):
    layouts = [
        layout
        for pod in range(nodes)
        for layout in pod_layouts(task(nodes, processes), {POD_INDEX_ENV: str(pod)})
    ]
    assert [layout.rank for layout in layouts] == list(range(nodes * processes))
    assert {layout.world_size for layout in layouts} == {nodes * processes}
    assert {layout.local_size for layout in layouts} == {processes}
    assert [layout.local_rank for layout in layouts] == list(range(processes)) * nodes
    hosts = {layout.master_host for layout in layouts}
    assert hosts == ({HOST} if nodes > 1 else {LOOPBACK})
    assert nodes == 1 or {layout.master_port for layout in layouts} == {RENDEZVOUS_PORT}


def test_a_layout_survives_the_environment():
    layout = RankLayout(3, 1, 6, 2, HOST, 29500)
    assert RankLayout.from_environment(layout.environment) == layout


@pytest.mark.parametrize(
    "host", ["", "evil.example", "job-0.job.clinic-b.svc", "x.clinic-a.svc.evil.example", "10.0.0.1"]
)
def test_ranks_meet_nowhere_but_in_the_owners_namespace(host):
    with pytest.raises(StageFailure, match="clinic-a") as failure:
        pod_layouts(task(2, 1, host), {POD_INDEX_ENV: "0"})
    assert failure.value.reason is Reason.TASK_INVALID


def test_a_pod_too_many_is_refused():
    with pytest.raises(StageFailure, match="pod 2 of 2"):
        pod_layouts(task(2, 1), {POD_INDEX_ENV: "2"})


@pytest.mark.usefixtures("alone")
def test_what_the_first_rank_finds_is_what_all_ranks_get():
    def refuse():
        raise StageFailure(Reason.CONSENT_REFUSED, "no")

    assert on_first_rank(lambda: 7) == 7
    with pytest.raises(StageFailure, match="no"):
        on_first_rank(refuse)

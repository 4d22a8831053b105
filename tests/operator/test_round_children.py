"""Golden manifests: what the builders make, in full. `UPDATE_GOLDEN=1 pytest …` writes the files anew."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.aio.client import ApiClient, Configuration
from round_worlds import EVALUATION, IMAGE, NEW, SETTINGS, a_client, a_plan, a_round, nn
from signers import OWNER_KEY

from tributary_api.shared import Resources
from tributary_api.tasks import TASK_ENV, TrainTask
from tributary_operator.api import Api
from tributary_operator.pods import threads
from tributary_operator.rounds import children
from tributary_operator.rounds.situation import Run

GOLDEN = Path(__file__).parent / "golden"

GANG = a_client(
    data={"uri": "pvc://texts/notes/"},
    worker={
        "nodes": 2,
        "processesPerNode": 2,
        "resources": {"requests": {"cpu": "4", "memory": "2Gi"}},
        "nodeSelector": {"disk": "fast"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "queueName": "owners",
        "allowedImages": [IMAGE],
    },
)
ROUND = a_round(evaluation=EVALUATION)
RUN = Run(ROUND, a_plan(ROUND, [GANG]), SETTINGS)
(PLANNED,) = RUN.plan.cohort

MANIFESTS = {
    "train-job": children.train_job(RUN, PLANNED, GANG, 1),
    "rendezvous-service": children.rendezvous_service(RUN, PLANNED, attempt=1, job_uid="uid-of-the-job"),
    "aggregate-job": children.aggregate_job(RUN, {nn("a"): OWNER_KEY.public}, 0),
    "evaluate-job": children.evaluate_job(RUN, NEW, 0),
}


def readable(manifest: Any) -> str:
    """As YAML, the task's JSON unfolded."""
    plain = Api(ApiClient(Configuration()), 1).plain(manifest)
    for container in plain["spec"].get("template", {}).get("spec", {}).get("containers", []):
        for variable in container["env"]:
            if variable["name"] == TASK_ENV:
                variable["value"] = json.loads(variable["value"])
    return yaml.safe_dump(plain, sort_keys=True)


@pytest.mark.parametrize("name", MANIFESTS)
async def test_golden(name: str) -> None:
    path = GOLDEN / f"{name}.yaml"
    text = readable(MANIFESTS[name])
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def task_of(job: Any) -> TrainTask:
    (container,) = job.spec.template.spec.containers
    return TrainTask.model_validate_json(next(e.value for e in container.env if e.name == TASK_ENV))


def test_the_grant_is_the_same_for_every_attempt() -> None:
    tasks = [task_of(children.train_job(RUN, PLANNED, GANG, attempt)) for attempt in (0, 1)]
    assert tasks[0].grant.digest == tasks[1].grant.digest == PLANNED.grant.digest
    assert tasks[0].delta_uri == tasks[1].delta_uri


def test_the_gang_meets_where_the_service_points() -> None:
    service = MANIFESTS["rendezvous-service"]
    host = task_of(MANIFESTS["train-job"]).rendezvous_host
    assert host == f"{service.metadata.name}-0.{service.metadata.name}.a.svc"


def test_credentials_of_the_data_store_are_apart() -> None:
    plain = a_client(data={"store": {"credentialsSecret": "tributary-data"}})
    job = children.train_job(RUN, PLANNED, plain, 0)
    secrets = {
        e.name: e.value_from.secret_key_ref.name
        for e in job.spec.template.spec.containers[0].env
        if e.value_from
    }
    assert secrets == {
        "AWS_ACCESS_KEY_ID": "tributary-store",
        "AWS_SECRET_ACCESS_KEY": "tributary-store",
        "DATA_AWS_ACCESS_KEY_ID": "tributary-data",
        "DATA_AWS_SECRET_ACCESS_KEY": "tributary-data",
    }


@pytest.mark.parametrize(
    ("resources", "processes", "each"),
    [({}, 1, 1), ({"requests": {"cpu": "4"}}, 2, 2), ({"limits": {"cpu": "500m"}}, 1, 1),
     ({"requests": {"cpu": 2}, "limits": {"cpu": "8"}}, 3, 2)],
)  # fmt: skip
def test_threads_share_the_cpus(resources: dict[str, Any], processes: int, each: int) -> None:
    assert threads(Resources.model_validate(resources), processes) == each

"""The children of a release: what their pods may do, how they come and go, and what they are called."""

from __future__ import annotations

import json
from typing import Any

import pytest
from release_worlds import IMAGE, SETTINGS, a_model, a_release

from tributary_api.release import Revision
from tributary_api.tasks import SERVE_PORT, TASK_ENV, ServeTask
from tributary_operator import names
from tributary_operator.releases import children, identity
from tributary_operator.releases.identity import Rivals

PARENT = a_model("m1")
REVISION = Revision(revision="0123456789", model=a_model("int8"), parent=PARENT, bytes=100, parent_bytes=400)


def deployment(**serving: Any) -> Any:
    return children.serving_deployment(a_release(serving=serving), REVISION, SETTINGS)


def container(made: Any) -> Any:
    (found,) = made.spec.template.spec.containers
    return found


def test_the_server_is_told_what_to_serve() -> None:
    (task,) = [e.value for e in container(deployment()).env if e.name == TASK_ENV]
    found = ServeTask.model_validate_json(task)
    assert (found.model, found.release, found.revision) == (REVISION.model, "assistant", REVISION.revision)


def test_a_pod_is_sent_requests_only_while_it_can_answer() -> None:
    server = container(deployment())
    assert server.readiness_probe.http_get.path == "/readyz"
    assert {server.liveness_probe.http_get.path, server.startup_probe.http_get.path} == {"/healthz"}
    assert [(p.name, p.container_port) for p in server.ports] == [(children.PORT_NAME, SERVE_PORT)]


@pytest.mark.parametrize("drain_seconds", [1, 30, 3600])
def test_a_pod_that_goes_has_time_for_its_open_requests(drain_seconds: int) -> None:
    made = deployment(drain={"timeoutSeconds": drain_seconds})
    pause = container(made).lifecycle.pre_stop.sleep.seconds
    assert pause > 0, "proxies still send to it for a moment"
    assert made.spec.template.spec.termination_grace_period_seconds > pause + drain_seconds


def test_no_pod_goes_before_its_successor_is_ready() -> None:
    rolling = deployment().spec.strategy.rolling_update
    assert (rolling.max_unavailable, rolling.max_surge) == (0, 1)


def test_the_deployment_tells_what_it_serves_even_if_the_status_is_lost() -> None:
    text = deployment().metadata.annotations[names.REVISION_RECORD]
    assert Revision.model_validate_json(text) == REVISION


def test_the_service_selects_the_pods_of_one_revision() -> None:
    service = children.service(a_release(), REVISION.revision)
    labels = deployment().spec.template.metadata.labels
    assert service.spec.selector.items() <= labels.items()
    assert service.spec.selector[names.REVISION] == REVISION.revision
    assert deployment().spec.selector.match_labels.items() <= labels.items()


def jobs() -> list[Any]:
    release = a_release()
    key = identity.compression_key(release, PARENT, SETTINGS)
    compress = children.compress_job(release, PARENT, key, attempt=0, settings=SETTINGS)
    gate = children.gate_job(release, REVISION, Rivals(), key, attempt=0, settings=SETTINGS)
    return [compress, gate]


@pytest.mark.parametrize("job", jobs(), ids=lambda job: job.metadata.labels[names.STAGE])
def test_a_job_ends_by_itself_and_goes_with_its_release(job: Any) -> None:
    assert job.spec.backoff_limit == 0
    assert job.spec.active_deadline_seconds == SETTINGS.hub_job_deadline_seconds
    assert job.spec.ttl_seconds_after_finished is not None
    (owner,) = job.metadata.owner_references
    assert (owner.kind, owner.uid) == ("ModelRelease", "u1")
    assert container(job).args == [job.metadata.labels[names.STAGE]]


@pytest.mark.parametrize("made", [*jobs(), deployment()], ids=lambda made: made.metadata.labels[names.STAGE])
def test_no_pod_of_a_release_holds_credentials_for_private_data(made: Any) -> None:
    pod = made.spec.template.spec
    secrets = {e.value_from.secret_key_ref.name for e in container(made).env if e.value_from}
    assert secrets == {SETTINGS.serving_secret}
    assert all(volume.empty_dir is not None for volume in pod.volumes)
    assert pod.automount_service_account_token is False
    assert container(made).image == IMAGE


@pytest.mark.parametrize("length", [1, 40, 63])
def test_names_fit_and_tell_apart(length: int) -> None:
    one = a_release().model_copy(
        update={"metadata": a_release().metadata.model_copy(update={"name": "r" * length})}
    )
    made = {
        names.release_job(one, names.COMPRESS, "0123456789", 0),
        names.release_job(one, names.COMPRESS, "0123456789", 1),
        names.release_job(one, names.GATE, "0123456789", 0),
        names.release_job(one, names.GATE, "9876543210", 0),
        names.serving_deployment(one, "0123456789"),
    }
    assert len(made) == 5
    assert max(map(len, made)) <= names.NAME_LENGTH_MAX


def test_a_gate_is_about_one_pair_on_one_data_set() -> None:
    release, candidate, other = a_release(), a_model("candidate"), a_model("other")
    rivals = [Rivals(), Rivals(stable=other), Rivals(stable_parent=other), Rivals(best=other)]
    keys = [identity.gate_key(release, candidate, PARENT, found, SETTINGS) for found in rivals]
    keys += [
        identity.gate_key(release, other, PARENT, Rivals(stable=candidate), SETTINGS),
        identity.gate_key(release, candidate, other, Rivals(stable=PARENT), SETTINGS),
        identity.gate_key(strict(release), candidate, PARENT, Rivals(stable=other), SETTINGS),
    ]
    assert len(set(keys)) == 7


def strict(release: Any) -> Any:
    gate = {**json.loads(release.spec.gate.canonical_json()), "metrics": [{"margin": "0.001"}]}
    return a_release(gate=gate)

"""What a Deployment and a Service of a release say, as the API server shows them."""

from __future__ import annotations

from typing import Any

import pytest
from release_worlds import a_model

from tributary_api.release import Revision
from tributary_operator import names
from tributary_operator.releases.observe import observed_revision, observed_service

RECORD = Revision(revision="0123456789", model=a_model("int8"), parent=a_model("m1"))


def raw_deployment(*, wanted: int = 2, record: str | None = None, **status: Any) -> Any:
    counts = dict.fromkeys(("replicas", "updatedReplicas", "readyReplicas", "availableReplicas"), wanted)
    text = RECORD.canonical_json().decode() if record is None else record
    return {
        "metadata": {
            "namespace": "hub",
            "name": "assistant-0123456789",
            "uid": "u2",
            "generation": 3,
            "annotations": {names.REVISION_RECORD: text},
        },
        "spec": {"replicas": wanted},
        "status": {"observedGeneration": 3, **counts, **status},
    }


def observed(**changes: Any) -> Any:
    found = observed_revision(raw_deployment(**changes))
    assert found is not None
    return found


def test_all_pods_ready() -> None:
    found = observed()
    assert found.is_fully_available
    assert (found.record, found.replicas, found.ready, found.problem) == (RECORD, 2, 2, "")


@pytest.mark.parametrize(
    "status",
    [
        {"readyReplicas": 1, "availableReplicas": 1},
        {"availableReplicas": 1},
        {"updatedReplicas": 1},
        {"replicas": 3},  # a pod of an older template is still there
        {"observedGeneration": 2},  # the figures are about an earlier spec
        {"readyReplicas": 0, "availableReplicas": 0},
    ],
    ids=str,
)
def test_anything_less_is_not_fully_available(status: Any) -> None:
    assert not observed(**status).is_fully_available


def test_no_pods_are_not_availability() -> None:
    assert not observed(wanted=0).is_fully_available


def test_kubernetes_says_why_it_gave_up() -> None:
    gave_up = {
        "type": "Progressing",
        "status": "False",
        "reason": "ProgressDeadlineExceeded",
        "message": "late",
    }
    assert observed(conditions=[gave_up]).problem == "ProgressDeadlineExceeded: late"
    assert observed(conditions=[{**gave_up, "status": "True"}]).problem == ""


@pytest.mark.parametrize("record", ["", "{}", "no JSON"])
def test_a_deployment_without_its_record_is_no_revision(record: str) -> None:
    assert observed_revision(raw_deployment(record=record)) is None


def test_a_fresh_deployment_has_no_status_yet() -> None:
    fresh = {**raw_deployment(), "status": {}}
    found = observed_revision(fresh)
    assert found is not None
    assert (found.ready, found.is_fully_available) == (0, False)


@pytest.mark.parametrize(
    ("spec", "revision"),
    [({"selector": {names.REVISION: "r1"}}, "r1"), ({"selector": {"app": "x"}}, ""), ({}, "")],
)
def test_a_service_tells_the_revision_that_it_selects(spec: Any, revision: str) -> None:
    metadata = {"namespace": "hub", "name": "assistant", "uid": "u3"}
    found = observed_service({"metadata": metadata, "spec": spec}, is_ours=True)
    assert found.revision == revision

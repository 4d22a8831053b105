"""From what pods and Jobs say to the one reason that a client failed for."""

from __future__ import annotations

from typing import Any

import pytest

from tributary_api.failures import Reason, TerminationMessage
from tributary_operator import names
from tributary_operator.jobs import JobState, ObservedJob
from tributary_operator.rounds.workers import failure_of

SAID = TerminationMessage(reason=Reason.DATA_EMPTY, message="no record").model_dump_json(by_alias=True)


class Pods:
    """Lists what it was given."""

    def __init__(self, *ends: dict[str, Any]) -> None:
        self.ends = ends

    async def find(self, *_: Any) -> tuple[list[dict[str, Any]], str]:
        statuses = [{"containerStatuses": [{"state": {"terminated": end}}]} for end in self.ends]
        return [{"status": status} for status in statuses], "1"


def job(state: JobState = JobState.FAILED, reason: str = "BackoffLimitExceeded") -> ObservedJob:
    return ObservedJob("a", "job", "uid", names.TRAIN, 0, state, reason=reason, message="said by the Job")


def end(code: int, at: int = 0, **more: Any) -> dict[str, Any]:
    return {"exitCode": code, "finishedAt": f"2026-01-01T00:00:{at:02d}Z", **more}


@pytest.mark.parametrize(
    ("pods", "failed", "reason", "retryable"),
    [
        (Pods(end(11, message=SAID)), job(), "DataEmpty", False),
        (Pods(end(137, reason="OOMKilled")), job(), "OOMKilled", False),
        (Pods(end(1, message="Traceback")), job(), "WorkerCrashed", True),
        (Pods(end(1, 5, message="Traceback"), end(11, 2, message=SAID)), job(), "DataEmpty", False),
        (Pods(end(0), end(11, 9, message=SAID)), job(), "DataEmpty", False),
        (Pods(), job(reason="DeadlineExceeded"), "DeadlineExceeded", False),
        (Pods(), job(), "BackoffLimitExceeded", True),
        (Pods(), job(JobState.SUCCEEDED), "NoResult", True),
    ],
)
async def test_failure(pods: Any, failed: ObservedJob, reason: str, retryable: bool) -> None:
    found = await failure_of(pods, failed)
    assert (found.reason, found.is_retryable) == (reason, retryable)


def raw(**status: Any) -> dict[str, Any]:
    labels = {names.STAGE: names.TRAIN, names.ATTEMPT: "3"}
    metadata = {"name": "j", "namespace": "a", "uid": "u", "labels": labels}
    return {"metadata": metadata, "status": status}


def condition(type_: str, status: str = "True") -> dict[str, str]:
    return {"type": type_, "status": status, "reason": "R", "message": "m"}


@pytest.mark.parametrize(
    ("seen", "state"),
    [
        (raw(), JobState.PENDING),
        (raw(active=1), JobState.PENDING),
        (raw(active=1, ready=1), JobState.RUNNING),
        (raw(conditions=[condition("FailureTarget")], ready=0), JobState.PENDING),
        (raw(conditions=[condition("Failed")]), JobState.FAILED),
        (raw(conditions=[condition("Failed", "False")]), JobState.PENDING),
        (raw(conditions=[condition("SuccessCriteriaMet"), condition("Complete")]), JobState.SUCCEEDED),
    ],
)
def test_job_state(seen: dict[str, Any], state: JobState) -> None:
    observed = ObservedJob.of(seen)
    assert (observed.state, observed.attempt) == (state, 3)


def test_a_deleted_job_may_still_run() -> None:
    seen = raw(conditions=[condition("Complete")])
    seen["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    assert ObservedJob.of(seen).is_active

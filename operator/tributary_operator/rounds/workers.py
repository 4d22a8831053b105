"""Why a Job failed: its pods' termination messages, else its own condition. Read once per failed Job."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ValidationError

from tributary_api.failures import TerminationMessage
from tributary_operator import names
from tributary_operator.api import JsonObject
from tributary_operator.cluster import Cluster
from tributary_operator.jobs import JobState, ObservedJob
from tributary_operator.kinds import POD
from tributary_operator.rounds.observed import WorkerFailure

OUT_OF_MEMORY = "OOMKilled"
DEADLINE_EXCEEDED = "DeadlineExceeded"


async def failure_of(cluster: Cluster, job: ObservedJob) -> WorkerFailure:
    """The reason of the pod that failed first; the others of a gang only followed it."""
    if job.state is JobState.SUCCEEDED:
        return WorkerFailure("NoResult", f"Job {job.name} succeeded, but what it makes is not there", True)
    pods, _ = await cluster.find(POD, job.namespace, {names.JOB_NAME: job.name})
    ends = sorted((end for pod in pods for end in _ends(pod)), key=lambda end: str(end.get("finishedAt", "")))
    if ends:
        return _of_container(ends[0])
    return _of_job(job)


def _ends(pod: JsonObject) -> Iterator[JsonObject]:
    """Terminations other than success."""
    for container in pod.get("status", {}).get("containerStatuses", []):
        end = container.get("state", {}).get("terminated")
        if end is not None and end.get("exitCode", 0) != 0:
            yield end


def _of_container(end: JsonObject) -> WorkerFailure:
    if end.get("reason") == OUT_OF_MEMORY:
        message = "the worker ran out of memory: raise its memory limit, or lower microBatchSize"
        return WorkerFailure(OUT_OF_MEMORY, message, False)
    try:
        said = TerminationMessage.model_validate_json(end.get("message", ""))
    except ValidationError:
        message = f"the worker ended with exit code {end['exitCode']} and said nothing"
        return WorkerFailure("WorkerCrashed", message, True)
    return WorkerFailure(said.reason.value, said.message, said.retryable)


def _of_job(job: ObservedJob) -> WorkerFailure:
    """No pod is left to ask. Running out of time would happen again; a lost pod or node need not."""
    return WorkerFailure(job.reason or "JobFailed", job.message, job.reason != DEADLINE_EXCEEDED)

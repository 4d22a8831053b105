"""The `serve` stage: answer completion requests with one model until the pod is asked to go."""

from __future__ import annotations

from collections.abc import Sequence

from tributary_api.failures import Reason
from tributary_api.shared import TaskKind
from tributary_api.tasks import ServeTask
from tributary_worker.compression.loading import LoadedModel, fetch_model
from tributary_worker.failures import StageFailure
from tributary_worker.serving.generation import GenerationError
from tributary_worker.serving.server import DrainingServer
from tributary_worker.serving.service import Service
from tributary_worker.store_access import open_store, store_failures
from tributary_worker.task_input import read_task, stage_log

ALL_ADDRESSES = "0.0.0.0"
GRACE_SECONDS_MAX = 5.0
"""Endpoints and kube-proxy usually follow within a second or two."""
GRACE_PART_MAX = 0.5
"""Of the drain's time: the rest is for responses that are still open."""


def main(_argv: Sequence[str]) -> int:
    task = read_task(ServeTask)
    log = stage_log("serve").bind(release=task.release, revision=task.revision)
    if task.task is not TaskKind.CAUSAL_LM:
        raise StageFailure(
            Reason.MODEL_UNSUPPORTED, f"a {task.task} model completes no text; serve a CausalLM"
        )
    server = build_server(task)
    log.info("serving", model=task.model.uri, port=task.port)
    server.run()
    if isinstance(server.failure, GenerationError):
        raise StageFailure(Reason.MODEL_UNSUPPORTED, f"{task.model.uri}: {server.failure}")
    if server.failure is not None:
        raise server.failure
    log.info("drained")
    return 0


def build_server(task: ServeTask, host: str = ALL_ADDRESSES) -> DrainingServer:
    """The server of a task, not yet running."""
    grace = min(GRACE_SECONDS_MAX, GRACE_PART_MAX * task.drain_timeout_seconds)
    return DrainingServer(
        Service.of(task.release, task.revision, task.max_sequence_length),
        lambda: _model(task),
        host=host,
        port=task.port,
        grace_seconds=grace,
        finish_seconds=task.drain_timeout_seconds - grace,
    )


def _model(task: ServeTask) -> LoadedModel:
    with store_failures():
        return fetch_model(open_store(task.store), task.model, task.task)

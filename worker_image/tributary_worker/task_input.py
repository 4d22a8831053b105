"""What a stage is asked to do, and how it says what it does: the task's JSON in, lines of JSON out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import structlog
from pydantic import ValidationError

from tributary_api.base import ApiModel
from tributary_api.failures import Reason
from tributary_api.tasks import TASK_ENV
from tributary_worker.failures import StageFailure

T = TypeVar("T", bound=ApiModel)

PROGRESS_INTERVAL_SECONDS = 5.0
POD_INDEX_ENV = "JOB_COMPLETION_INDEX"
"""Set by Kubernetes in the pods of an Indexed Job."""


def read_task(kind: type[T]) -> T:
    """The task in the environment. Raises StageFailure (TaskInvalid) if there is none of this kind."""
    text = os.environ.get(TASK_ENV)
    if text is None:
        raise StageFailure(Reason.TASK_INVALID, f"set {TASK_ENV} to the JSON of a {kind.__name__}")
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise StageFailure(Reason.TASK_INVALID, f"{TASK_ENV} is not a {kind.__name__}: {faults}") from error


def stage_log(stage: str) -> Any:
    """A logger that writes one JSON object a line to stdout."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.JSONRenderer(),
        ]
    )
    return structlog.get_logger().bind(stage=stage)


def progress_reporter(log: Any, **facts: Any) -> Callable[[int, int], None]:
    """A function (done, total) that logs at most every few seconds, and at the end."""
    last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= PROGRESS_INTERVAL_SECONDS:
            last = time.monotonic()
            log.info("progress", done=done, total=total, **facts)

    return report

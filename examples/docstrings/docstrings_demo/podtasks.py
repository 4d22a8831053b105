"""What the demo asks of its own pods: one JSON document each, the same models on both sides."""

from __future__ import annotations

import json
import os
from typing import Annotated, Any, TypeVar

from pydantic import Field

from tributary_api.base import ApiModel
from tributary_api.shared import StoreEndpoint

TASK_ENV = "DEMO_TASK"


class PublishTask(ApiModel):
    """Write an owner's documents to its own bucket, the private ones and the published tenth apart."""

    packages: Annotated[list[str], Field(min_length=1)]
    documents_max: int
    store: StoreEndpoint
    private_uri: str
    published_uri: str
    declared_examples: int
    holdout_fraction: float


class PretrainTask(ApiModel):
    """Train the base model on the standard library's docstrings and push it."""

    store: StoreEndpoint
    models_uri: str


class LoadTask(ApiModel):
    """Send completions to a release, without pause, until asked to end."""

    url: str
    model: str
    connections: int
    """How many requests are open at any time: one half on kept connections, the other on a new one each."""
    max_tokens: int
    timeout_seconds: float


Task = TypeVar("Task", bound=ApiModel)


def read_task(kind: type[Task]) -> Task:
    return kind.model_validate_json(os.environ[TASK_ENV])


def say(**fields: Any) -> None:
    """One JSON line in the pod's log, which is where the demo looks for progress and results."""
    print(json.dumps(fields), flush=True)

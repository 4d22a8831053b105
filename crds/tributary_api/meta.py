"""Metadata and conditions, as far as the operator reads them."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field

from tributary_api.base import ApiModel, Name

ConditionStatus = Literal["True", "False", "Unknown"]


class ObjectMeta(ApiModel):
    name: str
    namespace: str
    uid: str = ""
    generation: int = 1
    resource_version: str = ""
    creation_timestamp: datetime | None = None
    deletion_timestamp: datetime | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    finalizers: list[str] = []


class Condition(ApiModel):
    """One aspect of the object's state, in the form of the Kubernetes API conventions."""

    type: Annotated[str, Field(max_length=64)]
    """What the condition is about."""
    status: ConditionStatus
    """True, False or Unknown."""
    observed_generation: Annotated[int, Field(ge=0)] | None = None
    """The generation of the spec that the condition was computed from."""
    last_transition_time: datetime
    """When the status last changed."""
    reason: Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")]
    """Why, in one CamelCase word for programs."""
    message: Annotated[str, Field(max_length=4096)] = ""
    """Why, in a sentence for people."""


Conditions = Annotated[
    list[Condition],
    Field(
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    ),
]

EPOCH = "1970-01-01T00:00:00Z"


def waiting(*types: str) -> list[Condition]:
    """Default conditions: a fresh object is never mistaken for a healthy one."""
    return [
        Condition.model_validate(
            {
                "type": t,
                "status": "Unknown",
                "lastTransitionTime": EPOCH,
                "reason": "Waiting",
                "message": "Waiting for the operator",
            }
        )
        for t in types
    ]


class NamespacedName(ApiModel):
    """A client of a cohort, or any other object, by namespace and name."""

    namespace: Name
    name: Name

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class LocalReference(ApiModel):
    name: Name
    """The name of an object in the same namespace."""

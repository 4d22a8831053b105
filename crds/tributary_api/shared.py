"""Types that more than one kind uses: models, datasets, stores, pod resources."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from tributary_api.base import ApiModel, Digest, Labels, Name, Quantity, S3Uri, validations
from tributary_api.meta import LocalReference

SECRET_PREFIX = "tributary-"
"""Of every Secret that a worker may use: admission keeps the operator away from all others of a namespace."""

SecretName = Annotated[
    Name,
    Field(
        json_schema_extra=validations(
            (
                f"self.startsWith('{SECRET_PREFIX}')",
                f"the name of a Secret for workers must start with {SECRET_PREFIX}: no other Secret can be used",
            )
        )
    ),
]


class TaskKind(StrEnum):
    """What the model is trained for."""

    CAUSAL_LM = "CausalLM"
    SEQUENCE_CLASSIFICATION = "SequenceClassification"


class ModelRef(ApiModel):
    """A model bundle: where it lies, and the digest of its bytes."""

    uri: S3Uri
    """Where the bundle lies, for example s3://tributary/models/<sha256>."""
    digest: Digest
    """Digest of the bundle, as `tributary model push` printed it; other bytes are refused."""


class ModelSource(ApiModel):
    """A model by URI and digest, or the result of a round."""

    model_config = ConfigDict(
        json_schema_extra=validations(
            ("has(self.uri) != has(self.roundRef)", "give either uri and digest, or roundRef"),
            (
                "has(self.uri) == has(self.digest)",
                "uri and digest go together: `tributary model push` prints both",
            ),
        )
    )
    uri: S3Uri | None = None
    """Where the bundle lies. Needs digest."""
    digest: Digest | None = None
    """Digest of the bundle, as `tributary model push` printed it; other bytes are refused."""
    round_ref: LocalReference | None = None
    """A FederatedRound of the same namespace: its model, once it is complete. Resolved once."""


class DatasetRef(ApiModel):
    """A public data set: one JSON-lines object with a `text` field (and `label` for classification)."""

    uri: S3Uri
    """The object, for example s3://tributary/datasets/public.jsonl."""
    digest: Digest
    """SHA-256 of the object's bytes; other bytes are refused."""


class StoreEndpoint(ApiModel):
    """How to reach an S3 store. Credentials never stand here."""

    endpoint: Annotated[str, Field(pattern=r"^https?://\S+$", max_length=512)] | None = None
    """URL of the S3 endpoint; absent for AWS."""
    region: Annotated[str, Field(max_length=64)] = "us-east-1"
    """Region name used to sign requests."""


class Store(StoreEndpoint):
    """An S3 store and the Secret with the identity to use there."""

    credentials_secret: SecretName | None = None
    """Secret of this namespace with the keys AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY. Absent: workload identity of the service account."""


class Toleration(ApiModel):
    key: Annotated[str, Field(max_length=316)] | None = None
    """Taint key; absent matches every key with the operator Exists."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """Exists matches any value."""
    value: Annotated[str, Field(max_length=63)] | None = None
    """Taint value, with the operator Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Taint effect; absent matches all."""
    toleration_seconds: int | None = None
    """How long a NoExecute taint is tolerated, in seconds."""


ResourceList = Annotated[dict[str, Quantity], Field(max_length=16)]


class Resources(ApiModel):
    """Requests and limits of one pod, as in a pod's container."""

    requests: ResourceList = {}
    """What the scheduler sets aside for each pod."""
    limits: ResourceList = {}
    """What each pod may use at most, for example nvidia.com/gpu."""


class Placement(ApiModel):
    """Which nodes pods may go to."""

    node_selector: Labels = {}
    """Labels that a node must carry."""
    tolerations: Annotated[list[Toleration], Field(max_length=16)] = []
    """Taints that the pods tolerate."""


class Metric(ApiModel):
    """A measured number, as text."""

    name: Annotated[str, Field(max_length=64)]
    """What was measured."""
    value: Annotated[str, Field(max_length=32)]
    """The number, as text."""

"""What the operator asks of a worker pod: one JSON document for each stage, the same model on both sides."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from tributary_api.aggregation import Aggregation, DeltaEncoding
from tributary_api.base import ApiModel, Digest, PublicKey
from tributary_api.client import ClientData
from tributary_api.meta import NamespacedName
from tributary_api.records import Grant, ModelRole, Signature
from tributary_api.release import CompressionStep, Gate
from tributary_api.round import Method, Training
from tributary_api.shared import DatasetRef, ModelRef, StoreEndpoint, TaskKind

TASK_ENV = "TRIBUTARY_TASK"
"""Environment variable that holds the task as JSON."""
NOISE_KEY_PATH = "/var/run/tributary/noise-key/key"
"""Where the tenant's noise key is mounted in a training pod."""
DATA_MOUNT_PATH = "/var/run/tributary/data"
"""Where the claim of a pvc:// data URI is mounted, read-only, in a training pod."""
DATA_CREDENTIALS_PREFIX = "DATA_"
"""Prefix of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY when the data lies in a store of its own."""
RENDEZVOUS_PORT = 29500
"""Port on which index 0 of a training Job waits for the other pods."""
SERVE_PORT = 8080
"""Port of the inference server."""


class TrainTask(ApiModel):
    grant: Grant
    grant_signature: Signature
    """The hub's."""
    base_model: ModelRef
    task: TaskKind
    method: Method
    training: Training
    data: ClientData
    ledger_uri: str
    store: StoreEndpoint
    """Exchange store. Credentials come from AWS_* in the environment."""
    delta_uri: str
    manifest_uri: str
    delta_encoding: DeltaEncoding = DeltaEncoding.FLOAT32
    """How the delta is stored; chosen after noise, so no part of the grant."""
    nodes: Annotated[int, Field(ge=1)] = 1
    processes_per_node: Annotated[int, Field(ge=1)] = 1
    rendezvous_host: str = ""
    """DNS name of the pod with index 0; empty with one node."""
    image: str = ""
    attempt: Annotated[int, Field(ge=0)] = 0


class DeltaInput(ApiModel):
    client: NamespacedName
    delta_uri: str
    manifest_uri: str
    grant_digest: Digest
    receipt_key: PublicKey
    """The key that the manifest must be signed with."""
    weight: Annotated[float, Field(gt=0)]


class AggregateTask(ApiModel):
    run_key: str
    round: NamespacedName
    base_model: ModelRef
    task: TaskKind = TaskKind.CAUSAL_LM
    """Beside adapters a classifier's head is trained in full."""
    method: Method
    aggregation: Aggregation
    deltas: list[DeltaInput]
    quorum: Annotated[int, Field(ge=1)]
    """With fewer usable deltas than this the stage fails."""
    store: StoreEndpoint
    models_uri: str
    """Folder under which the new bundle is written, named by a key of what it is made of."""
    manifest_uri: str
    """The pods' records lie beside it."""


class ScoredModel(ApiModel):
    role: ModelRole
    model: ModelRef


class EvaluateTask(ApiModel):
    """Score models on a public data set and write an EvaluationReport."""

    task: TaskKind
    models: Annotated[list[ScoredModel], Field(min_length=1)]
    dataset: DatasetRef
    max_sequence_length: int = 128
    store: StoreEndpoint
    report_uri: str


class CompressTask(ApiModel):
    """Compress a model and write a CompressionManifest."""

    task: TaskKind
    model: ModelRef
    steps: list[CompressionStep]
    store: StoreEndpoint
    releases_uri: str
    """Folder under which the new bundle is written as <sha256>/."""
    manifest_uri: str


class GateTask(ApiModel):
    """Examine a candidate, compare it with what it must not be worse than, and write a GateVerdict."""

    task: TaskKind
    candidate: ModelRef
    parent: ModelRef
    stable: ModelRef | None = None
    """In service; absent for the first release."""
    stable_parent: ModelRef | None = None
    """What the stable model was compressed from."""
    best: ModelRef | None = None
    """The best that ever served, if it is another one."""
    gate: Gate
    max_sequence_length: int = 128
    store: StoreEndpoint
    verdict_uri: str


class ServeTask(ApiModel):
    """Serve a model until the pod is asked to go."""

    task: TaskKind
    model: ModelRef
    release: str
    """Name of the ModelRelease, and the model's name in the API."""
    revision: str
    """Named in the header x-tributary-release of every response, as <release>/<revision>."""
    max_sequence_length: int
    drain_timeout_seconds: int
    store: StoreEndpoint
    port: int = SERVE_PORT

"""FederatedRound: one round of federated training. Runs once, like a Job."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from tributary_api.aggregation import Aggregation, enough_clients
from tributary_api.base import (
    ApiModel,
    Decimal,
    Digest,
    IntOrPercent,
    Labels,
    S3Uri,
    canonical_json,
    sha256_of,
    validations,
)
from tributary_api.meta import Conditions, NamespacedName, ObjectMeta, waiting
from tributary_api.shared import DatasetRef, Metric, ModelRef, ModelSource, TaskKind


class LabelSelector(ApiModel):
    match_labels: Labels = {}
    """Labels that an object must carry, all of them. Empty matches everything."""


class ClientSample(ApiModel):
    count: Annotated[int, Field(ge=1, le=100000)]
    """How many of the eligible clients take part."""
    seed: int = 0
    """Seed of the draw; the cohort is frozen in the plan."""


class ClientSelection(ApiModel):
    """Which FederatedClients take part."""

    namespace_selector: LabelSelector = LabelSelector()
    """Namespaces to look in, by label."""
    selector: LabelSelector = LabelSelector()
    """FederatedClients to take, by label."""
    sample: ClientSample | None = None
    """Take a random part of them."""
    min_available: IntOrPercent = "100%"
    """Quorum: how many of the cohort must deliver, as a count or a percentage."""
    launch_rate_per_second: Annotated[int, Field(ge=1, le=1000)] = 20
    """Jobs created per second at most."""


class LoraMethod(ApiModel):
    """Low-rank adapters; the result is merged into the model."""

    rank: Annotated[int, Field(ge=1, le=512)] = 8
    """Rank r of the adapters."""
    alpha: Annotated[int, Field(ge=1, le=1024)] = 16
    """Scale: the adapters count alpha / rank times."""
    freeze_a: bool = True
    """Train B alone: then the mean of the deltas is exact, and the noise is not multiplied."""
    target_modules: Annotated[list[Annotated[str, Field(max_length=128)]], Field(max_length=32)] = []
    """Module names to adapt, for example q_proj; empty chooses the attention and MLP projections of the architecture."""


class FullMethod(ApiModel):
    """All weights are trained. The noise grows with their number: see status.privacy.noiseToSignal."""


class Method(ApiModel):
    """Which weights are trained: those of adapters, or all. Beside adapters a classifier's head is trained too."""

    model_config = ConfigDict(
        json_schema_extra=validations(("has(self.lora) != has(self.full)", "choose one of lora and full"))
    )
    lora: LoraMethod | None = None
    full: FullMethod | None = None


class DeepSpeedSettings(ApiModel):
    """Settings of DeepSpeed that a round may choose."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] = 2
    """ZeRO stage of DeepSpeed: what is divided among the processes. 1: the optimizer's state, 2: gradients, 3: weights."""


class Training(ApiModel):
    """Local training of each client."""

    model_config = ConfigDict(
        json_schema_extra=validations(("double(self.learningRate) > 0.0", "learningRate must be above 0"))
    )
    max_steps: Annotated[int, Field(ge=1, le=1000000)]
    """Optimizer steps of each client."""
    expected_batch_size: Annotated[int, Field(ge=1, le=1000000)]
    """Records in a step on average (Poisson sampling). Larger is better under privacy."""
    micro_batch_size: Annotated[int, Field(ge=1, le=4096)] = 8
    """Records in one forward pass of one process."""
    learning_rate: Decimal
    """Learning rate; under privacy 3 to 10 times the usual one."""
    optimizer: Literal["AdamW", "SGD"] = "AdamW"
    """Optimizer of the local steps."""
    max_sequence_length: Annotated[int, Field(ge=2, le=1048576)] = 128
    """Tokens of a record that are used."""
    proximal_mu: Decimal = "0"
    """FedProx: weight of the pull towards the round's base model."""
    gradient_checkpointing: bool = False
    """Compute activations again instead of keeping them: less memory, about half as much time again."""
    base_dtype: Literal["Float32", "BFloat16"] = "Float32"
    """Type of the frozen weights beside adapters; BFloat16 halves their memory. Trained weights, norms, sums and noise are in 32 bits whatever it is."""
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()


class RoundPrivacy(ApiModel):
    """What the round costs each client. The noise multiplier is solved for."""

    model_config = ConfigDict(
        json_schema_extra=validations(
            ("double(self.epsilon) > 0.0", 'epsilon must be above 0, for example "2"'),
            (
                "double(self.delta) > 0.0 && double(self.delta) < 1.0",
                'delta must be above 0 and below 1, for example "1e-6"',
            ),
            ("double(self.maxGradNorm) > 0.0", 'maxGradNorm must be above 0, for example "0.5"'),
        )
    )
    epsilon: Decimal
    """ε that this round may spend at each client."""
    delta: Decimal
    """δ at which ε is stated; well below one over the number of examples."""
    max_grad_norm: Decimal = "0.5"
    """Clipping norm C of one record's gradient."""


class Evaluation(ApiModel):
    """How the new model is measured."""

    dataset: DatasetRef
    """Public data set on which the old and the new model are compared."""


_IMMUTABLE = " && ".join(
    f"(has(self.{f}) ? has(oldSelf.{f}) && self.{f} == oldSelf.{f} : !has(oldSelf.{f}))"
    for f in (
        "run",
        "baseModel",
        "task",
        "clients",
        "method",
        "training",
        "privacy",
        "aggregation",
        "evaluation",
        "clientBackoffLimit",
        "clientActiveDeadlineSeconds",
        "activeDeadlineSeconds",
    )
)


class FederatedRoundSpec(ApiModel):
    model_config = ConfigDict(
        json_schema_extra=validations(
            (
                _IMMUTABLE,
                "a round runs once and its spec cannot change (only suspend and ttlSecondsAfterFinished): create another round",
            ),
            (
                "!has(self.method.full) || self.training.baseDtype == 'Float32'",
                "with method.full nothing is frozen: set training.baseDtype to Float32",
            ),
            (
                f"!has(self.clients.sample) || {enough_clients('self.clients.sample.count')}",
                "clients.sample.count is too small for aggregation.strategy: raise it, lower byzantineClients or use FedAvg",
            ),
            (
                f"type(self.clients.minAvailable) != int || {enough_clients('int(self.clients.minAvailable)')}",
                "clients.minAvailable is too small for aggregation.strategy: raise it, lower byzantineClients or use FedAvg",
            ),
        )
    )
    run: Annotated[int, Field(ge=1)] = 1
    """Change it in a re-created round to run the same spec again on purpose; it spends privacy budget again."""
    suspend: bool = False
    """Stops the round where it is; running workers are stopped, nothing is charged twice. Suspended time counts toward activeDeadlineSeconds."""
    base_model: ModelSource
    """The model that the round starts from."""
    task: TaskKind = TaskKind.CAUSAL_LM
    clients: ClientSelection
    method: Method
    training: Training
    privacy: RoundPrivacy
    aggregation: Aggregation = Aggregation()
    evaluation: Evaluation | None = None
    client_backoff_limit: Annotated[int, Field(ge=0, le=10)] = 1
    """Further attempts for a client whose worker failed."""
    client_active_deadline_seconds: Annotated[int, Field(ge=1)] = 3600
    """A client's worker is stopped after this time."""
    active_deadline_seconds: Annotated[int, Field(ge=1)] = 7200
    """The round ends after this time: with the quorum if it is met, else as failed."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0)] = 86400
    """When the children of a finished round are removed. The round itself stays."""


class ClientCounts(ApiModel):
    selected: int = 0
    """Members of the cohort."""
    pending: int = 0
    """Not started, or waiting for a node."""
    running: int = 0
    """Training."""
    submitted: int = 0
    """Delta delivered."""
    failed: int = 0
    """Given up."""
    excluded: int = 0
    """Selected by label, but not eligible when the round was planned."""


class ClientFailure(ApiModel):
    """A client that does not take part, or failed, and why."""

    client: Annotated[str, Field(max_length=127)]
    """namespace/name"""
    reason: Annotated[str, Field(max_length=128)]
    """Why, in one word."""
    message: Annotated[str, Field(max_length=1024)] = ""
    """Why, in a sentence, with what to change."""


class PrivacyPlan(ApiModel):
    """What privacy will cost, known before anything is spent."""

    noise_multiplier: Annotated[str, Field(max_length=64)] = ""
    """σ of the cohort, as a range if clients differ."""
    expected_batch_size: int = 0
    """Records in a step on average."""
    noise_to_signal: Annotated[str, Field(max_length=64)] = ""
    """σ·√d over the expected batch, d the number of trained weights. Far above 1 the round cannot help: see NoiseAcceptable."""
    affordable_rounds: Annotated[int, Field(ge=0)] | None = None
    """How many such rounds the tightest budget of the cohort holds, this one included; at most 100 are counted."""


class AggregationStatus(ApiModel):
    """How far the aggregation is, and how many bytes it moved."""

    percent: int = 0
    """Of the bytes to read; looked at every few seconds."""
    megabytes_per_second: int = 0
    """Read by all pods together, since each began."""
    delta_bytes: int = 0
    """What the clients sent, once the new model is there."""
    bytes_read: int = 0
    """What the aggregation read for it: deltas, base model and the server optimizer's state."""
    bytes_written: int = 0
    """Size of the new weights and the new state."""


class FederatedRoundStatus(ApiModel):
    observed_generation: int = 0
    """The generation of the spec that this status is about."""
    conditions: Conditions = waiting("Ready")
    """Ready, Reconciling and Stalled as kstatus defines them, and one for each step that was reached."""
    run_key: Annotated[str, Field(max_length=64)] = ""
    """Identity of the run, from namespace, name and spec. Plan, deltas and outcome are kept under it."""
    clients: ClientCounts = ClientCounts()
    """How many clients stand where."""
    clients_summary: Annotated[str, Field(max_length=64)] = ""
    """Delivered of selected, for example 2/3."""
    failed_clients: Annotated[list[ClientFailure], Field(max_length=20)] = []
    """Excluded and failed clients, at most 20, with the reason of each."""
    privacy: PrivacyPlan = PrivacyPlan()
    base_model: ModelRef | None = None
    """The model that the round starts from, resolved."""
    aggregation: AggregationStatus | None = None
    model: ModelRef | None = None
    """The new model."""
    metrics: Annotated[list[Metric], Field(max_length=32)] = []
    """Public measurements of the old and the new model."""


class FederatedRound(ApiModel):
    """One round of private, federated training over the selected clients. Runs once, like a Job."""

    KIND: ClassVar[str] = "FederatedRound"
    PLURAL: ClassVar[str] = "federatedrounds"
    SHORT_NAMES: ClassVar[list[str]] = ["fround"]
    COLUMNS: ClassVar[list[tuple[str, str, str]]] = [
        ("Ready", "string", '.status.conditions[?(@.type=="Ready")].status'),
        ("Reason", "string", '.status.conditions[?(@.type=="Ready")].reason'),
        ("Clients", "string", ".status.clientsSummary"),
        ("Epsilon", "string", ".spec.privacy.epsilon"),
        ("Loss", "string", '.status.metrics[?(@.name=="loss")].value'),
        ("Baseline", "string", '.status.metrics[?(@.name=="baselineLoss")].value'),
        ("Age", "date", ".metadata.creationTimestamp"),
    ]

    metadata: ObjectMeta
    spec: FederatedRoundSpec
    """What to train, with whom and at what privacy cost. Immutable but for suspend and ttlSecondsAfterFinished."""
    status: FederatedRoundStatus = FederatedRoundStatus()
    """What the operator saw last. Written by the operator only."""

    @property
    def run_key(self) -> str:
        """Identity of the run: 40 hex digits of SHA-256 over namespace, name and the immutable spec.

        Fields left at their default do not count, so that a later version may add fields.
        """
        spec = self.spec.model_dump(
            mode="json",
            by_alias=True,
            exclude_none=True,
            exclude_defaults=True,
            exclude={"suspend", "ttl_seconds_after_finished"},
        )
        identity = {"namespace": self.metadata.namespace, "name": self.metadata.name, "spec": spec}
        return sha256_of(canonical_json(identity)).removeprefix("sha256:")[:40]

    @property
    def ref(self) -> NamespacedName:
        return NamespacedName(namespace=self.metadata.namespace, name=self.metadata.name)


__all__ = ["Digest", "FederatedRound", "FederatedRoundSpec", "FederatedRoundStatus", "S3Uri"]

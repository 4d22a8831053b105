"""Create-only records in the object store: the durable facts that reconciliation stands on."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from tributary_api.base import ApiModel, Decimal, Digest, PublicKey, S3Uri, canonical_json, sha256_of
from tributary_api.meta import NamespacedName
from tributary_api.round import ClientFailure, Method, Training
from tributary_api.shared import Metric, ModelRef, TaskKind

CHUNK_BYTES = 16 * 1024 * 1024
"""Digests are taken over chunks of this size, so that a reader can check while it streams."""


class MechanismSpec(ApiModel):
    """The DP-SGD run that ε is computed from: all public, all fixed before training."""

    num_examples: Annotated[int, Field(ge=1)]
    """N: declared examples, rounded down to two significant digits."""
    expected_batch_size: Annotated[int, Field(ge=1)]
    """q·N: also the constant divisor of the noised sum."""
    batch_cap: Annotated[int, Field(ge=1)]
    """B_max: a larger Poisson sample keeps a uniformly random part of this size."""
    steps: Annotated[int, Field(ge=1)]
    noise_multiplier: Annotated[float, Field(gt=0)]
    """σ: the noise's standard deviation over the clipping norm."""
    max_grad_norm: Annotated[float, Field(gt=0)]
    """C: the clipping norm of one record's gradient."""

    @property
    def sampling_probability(self) -> float:
        """q, the chance of each record to be in a step."""
        return self.expected_batch_size / self.num_examples


def computation_digest(method: Method, training: Training, task: TaskKind) -> str:
    """Digest of the settings that the gradients depend on.

    Fields left at their default do not count, so that a later version may add fields.
    """
    parts = [
        part.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True)
        for part in (method, training)
    ]
    return sha256_of(canonical_json([*parts, task]))


class Grant(ApiModel):
    """What one client may compute in one round. A worker refuses to run with anything else."""

    run_key: str
    hub_namespace: str
    round_name: str
    client: NamespacedName
    data_name: str
    base_model_digest: Digest
    mechanism: MechanismSpec
    epsilon: Decimal
    """ε that the round asks for; the mechanism costs no more than this."""
    delta: Decimal
    delta_uri: S3Uri
    """Where the one delta that this pays for is written: the create-only key excludes a second one."""
    computation: Digest
    """`computation_digest` of the round's settings: other ones make another delta, which costs again."""

    @property
    def digest(self) -> str:
        return sha256_of(self.canonical_json())


class Signature(ApiModel):
    """An Ed25519 signature (RFC 8032) of a record's canonical JSON, `tributary_accounting.signatures`."""

    key: PublicKey
    """Of whoever signed. A signature says something only where this key is known from elsewhere."""
    value: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


class PlannedClient(ApiModel):
    """A member of the cohort, frozen."""

    client: NamespacedName
    grant: Grant
    grant_signature: Signature
    """The hub's."""
    weight: Annotated[float, Field(gt=0)]
    """Weight of this client's delta in the mean."""
    ledger_uri: str
    nodes: Annotated[int, Field(ge=1)] = 1


class RoundPlan(ApiModel):
    """rounds/<runKey>/plan.json: written before anything is reserved or started."""

    run_key: str
    round: NamespacedName
    base_model: ModelRef
    worker_image: str
    cohort: list[PlannedClient]
    excluded: list[ClientFailure] = []
    quorum: Annotated[int, Field(ge=1)]
    planned_at: datetime


class OutcomeKind(StrEnum):
    COMPLETE = "Complete"
    FAILED = "Failed"


class RoundOutcome(ApiModel):
    """rounds/<runKey>/outcome.json: a round with an outcome starts nothing, ever."""

    run_key: str
    round: NamespacedName
    outcome: OutcomeKind
    reason: str
    message: str = ""
    model: ModelRef | None = None
    metrics: list[Metric] = []
    submitted: list[NamespacedName] = []
    failed: list[ClientFailure] = []
    finished_at: datetime


class FileDigest(ApiModel):
    """One file of a delta or bundle."""

    path: str
    size: Annotated[int, Field(ge=0)]
    chunks: list[Digest]
    """Of every CHUNK_BYTES chunk in order: several writers and readers can work on one file at a time."""


class SelfTestFigures(ApiModel):
    """Data-independent figures of the engine's self-test; the training ran only because they were in bounds."""

    planted_record_ratio: float
    """Movement of the summed gradient by a planted record of norm 1e6, over the clipping norm: at most 1."""
    noise_std_ratio: float
    """Standard deviation of the noise found on zero data, over the one that was due."""
    trainable_parameters: int


class Receipt(ApiModel):
    """What a worker states about the delta it publishes. Nothing in it depends on private values."""

    grant_digest: Digest
    mechanism: MechanismSpec
    neighboring_relation: Literal["REPLACE_SPECIAL"] = "REPLACE_SPECIAL"
    sampling: Literal["TruncatedPoisson"] = "TruncatedPoisson"
    epsilon: Decimal
    delta: Decimal
    self_test: SelfTestFigures
    versions: dict[str, str] = {}
    """Versions of torch, deepspeed, dp-accounting and tributary that ran."""
    image: str = ""


class DeltaManifest(ApiModel):
    """clients/<namespace>/<client>/rounds/<runKey>/manifest.json: written last; it makes the delta exist."""

    run_key: str
    client: NamespacedName
    base_model_digest: Digest
    file: FileDigest
    l2_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    """Of the noised values of the trained tensors, as a reader decodes them. Computed after noise: it is free."""
    receipt: Receipt
    signature: Signature | None = None
    """The tenant's, of everything else in here: a receipt cannot be moved to another delta. Unsigned is refused."""


class AggregateManifest(ApiModel):
    """rounds/<runKey>/aggregate/manifest.json: written last; it makes the new model exist."""

    run_key: str
    base_model: ModelRef
    model: ModelRef
    included: list[NamespacedName]
    excluded: list[ClientFailure] = []
    delta_bytes: int
    """What the included clients sent."""
    bytes_read: int
    bytes_written: int


class ShardRecord(ApiModel):
    """rounds/<runKey>/aggregate/<cohortKey>/shards/<n>.json: one file of the new model is uploaded, for good."""

    file: FileDigest
    state: list[FileDigest] = []
    """Files of the server optimizer's state that belong to this shard."""
    squares: list[float] = []
    """Of each delta, in the order of the clients' names: sum of the squares of its elements in this shard."""
    bytes_read: int


class GramRecord(ApiModel):
    """rounds/<runKey>/aggregate/<cohortKey>/gram/<n>.json: products of the deltas over one shard."""

    products: list[list[float]]
    """<d_i, d_j>, clients in the order of their names."""
    bytes_read: int


class ProgressMark(ApiModel):
    """rounds/<runKey>/aggregate/progress/<pod>/<percent>.json: how far one pod is, now and then."""

    bytes_done: int
    """Read by this pod."""
    bytes_total: int
    """That this pod has to read."""
    bytes_per_second: int


class OptimizerState(ApiModel):
    """Beside a model: what the server optimizer that made it remembers."""

    model_digest: Digest
    optimizer: str
    """Its settings as canonical JSON: another optimizer's memory is not used."""
    files: dict[str, dict[str, FileDigest]]
    """By the model's file and the name of what is remembered."""


class BundleManifest(ApiModel):
    """bundle.json of a model bundle: its files, and where it came from.

    The bundle's digest is taken over `files` alone, so that equal weights have equal digests whatever their history.
    """

    digest: Digest
    files: list[FileDigest]
    parents: list[ModelRef] = []
    run_key: str | None = None
    description: str = ""


ModelRole = Literal["baseline", "new", "candidate", "parent", "stable", "best"]
"""baseline and new are a round's; best is the best model that a release ever served."""


class DocumentScore(ApiModel):
    """Score of one public document under one model."""

    document: str
    """First 16 hex digits of the SHA-256 of its text."""
    tokens: int
    loss: float
    """Mean next-token loss, in nats."""
    accuracy: float
    """Part of the tokens that the model ranks first."""


class ModelScore(ApiModel):
    """A model on a public data set."""

    role: ModelRole
    model: ModelRef
    loss: float
    """Mean over all tokens, in nats."""
    perplexity: float
    accuracy: float
    documents: int
    tokens: int


class EvaluationReport(ApiModel):
    """rounds/<runKey>/evaluation.json: the models of a round on its public data set."""

    task: TaskKind
    dataset_digest: Digest
    scores: list[ModelScore]


class CompressionManifest(ApiModel):
    """releases/manifests/<key>.json: written last; it makes the compressed model exist."""

    parent: ModelRef
    model: ModelRef
    bytes: int
    """Size of the weight files, in bytes."""
    parent_bytes: int
    """Size of the parent's weight files, in bytes (fp32 if it is stored so)."""


class Comparison(ApiModel):
    """The candidate against one other model on the same documents, when the test was sure or had seen all."""

    against: Literal["parent", "stable", "best"]
    model: ModelRef
    metric: Literal["loss", "accuracy"]
    margin: float
    mean_difference: float
    """Mean over documents, more is worse: candidate's loss less the other's in nats, or share of wrong answers."""
    lower_bound: float
    upper_bound: float
    """One-sided confidence bounds of that mean at the level of this look; upper below the margin is no worse."""
    documents: int
    finding: Literal["PASS", "FAIL", "INCONCLUSIVE"]


class FidelityReport(ApiModel):
    """How near the candidate is to what it was compressed from, on the first documents."""

    documents: int
    tokens: int
    kl: float
    """Mean over tokens of KL(parent, candidate), in nats."""
    flips: float
    """Part of the tokens for which they rank different ones first."""
    worst_document: str
    worst_kl: float
    """Mean of that document."""
    previous_kl: float | None = None
    """The same from the parent of the stable model: a candidate that is nearer to it has stale weights."""


class PromptAnswer(ApiModel):
    """What the candidate said to a golden prompt."""

    prompt: str
    answer: str
    is_degenerate: bool


class GateVerdict(ApiModel):
    """gates/<key>.json: holds for this pair, data set and spec, and for no other."""

    verdict: Literal["PASS", "FAIL", "INCONCLUSIVE"]
    reason: str
    message: str = ""
    scores: list[ModelScore]
    comparisons: list[Comparison]
    documents_planned: int = 0
    """That the test would look at before it gives up; it stops as soon as it is sure."""
    fidelity: FidelityReport | None = None
    answers: list[PromptAnswer] = []
    per_document: dict[str, list[DocumentScore]] = {}
    """Scores by role, in the order of the test, so that anyone can repeat it."""


class LedgerKind(StrEnum):
    RESERVE = "reserve"
    LAUNCH = "launch"
    SETTLE = "settle"
    RELEASE = "release"


class LedgerEntry(ApiModel):
    """<ledgerUri>/<n>.json: one line of the privacy ledger of a data set. Never changed, never deleted."""

    n: Annotated[int, Field(ge=0)]
    previous: Annotated[str, Field(max_length=71)] = ""
    """Digest of entry n-1; empty for the first."""
    kind: LedgerKind
    data_set: NamespacedName
    """Namespace and data.name of the client."""
    client: NamespacedName
    run_key: str
    grant_digest: Digest
    hub_namespace: str
    mechanism: MechanismSpec
    delta: Decimal
    recorded_at: datetime
    reason: str = ""
    receipt_key: PublicKey | None = None
    """Of a launch: the key that the worker signs its receipt with. Nobody can change it afterwards."""

    @property
    def digest(self) -> str:
        return sha256_of(self.canonical_json())

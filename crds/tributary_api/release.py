"""ModelRelease: a language model in service, replaced blue-green. Long-lived, like a Rollout."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from tributary_api.base import ApiModel, Decimal, Digest, Name, validations
from tributary_api.meta import Conditions, ObjectMeta, waiting
from tributary_api.shared import DatasetRef, Metric, ModelRef, ModelSource, Placement, Resources, TaskKind


class QuantizationScheme(StrEnum):
    INT8 = "Int8"
    INT4 = "Int4"


class Quantize(ApiModel):
    scheme: QuantizationScheme
    """Int8: weights and embeddings in 8 bits with a scale per output channel. Int4: in 4 bits with a scale per group. Both in the compressed-tensors layout."""
    group_size: Annotated[int, Field(ge=32, le=1024)] = 128
    """Weights that share a scale under Int4; must divide the width of every matrix."""


class Prune(ApiModel):
    """Make a smaller dense model by leaving out what matters least. Distill afterwards to win quality back."""

    model_config = ConfigDict(
        json_schema_extra=validations(
            (
                "double(self.ffnFraction) < 1.0 && double(self.depthFraction) < 1.0",
                'pruning everything leaves no model: fractions must be below 1, for example "0.25"',
            ),
            (
                "double(self.ffnFraction) > 0.0 || double(self.depthFraction) > 0.0",
                'pruning nothing is no step: set ffnFraction or depthFraction, for example "0.25"',
            ),
        )
    )
    ffn_fraction: Decimal = "0"
    """Part of the hidden units of each feed-forward layer that go: those with the smallest activations."""
    depth_fraction: Decimal = "0"
    """Part of the blocks that go: those that change their input least."""
    dataset: DatasetRef | None = None
    """Public documents to measure on; absent: text sampled from the model."""
    max_sequence_length: Annotated[int, Field(ge=8, le=8192)] = 128
    """Of each measured text, in tokens."""


class Divergence(StrEnum):
    FORWARD = "Forward"
    REVERSE = "Reverse"
    JENSEN_SHANNON = "JensenShannon"


class Distill(ApiModel):
    """Teach the compressed model to answer like the uncompressed one."""

    model_config = ConfigDict(
        json_schema_extra=validations(
            (
                "has(self.dataset) || double(self.sampledFraction) == 1.0",
                'without a dataset all text must be sampled: set sampledFraction to "1", or give a public dataset',
            ),
            (
                "double(self.sampledFraction) <= 1.0 && double(self.alpha) <= 1.0 && double(self.beta) < 1.0 && double(self.beta) > 0.0",
                "sampledFraction and alpha are at most 1, and beta lies between 0 and 1",
            ),
            (
                "double(self.temperature) > 0.0 && double(self.learningRate) > 0.0",
                "temperature and learningRate must be above 0",
            ),
        )
    )
    steps: Annotated[int, Field(ge=1, le=1000000)]
    """Optimizer steps."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 16
    """Texts in each step."""
    max_sequence_length: Annotated[int, Field(ge=8, le=8192)] = 128
    """Of each text, in tokens."""
    learning_rate: Decimal = "3e-4"
    """Of AdamW at its peak: it rises over the first tenth of the steps and falls like a cosine."""
    divergence: Divergence = Divergence.FORWARD
    """Forward: KL(teacher, student). Reverse: KL(student, teacher). JensenShannon: between them, see beta."""
    beta: Decimal = "0.5"
    """Weight of the teacher in the mixture of JensenShannon."""
    temperature: Decimal = "1"
    """Softens both models' probabilities."""
    alpha: Decimal = "1"
    """Weight of the divergence; the rest is the text's own next-token loss."""
    dataset: DatasetRef | None = None
    """Public documents to learn from."""
    sampled_fraction: Decimal = "0.5"
    """Part of the texts that the teacher writes itself."""
    sampled_texts: Annotated[int, Field(ge=1, le=1000000)] = 256
    """How many texts the teacher writes; they are used again and again."""
    seed: Annotated[int, Field(ge=0, le=2147483647)] = 0
    """Of the sampled texts and the order of all; another seed gives another student."""


class CompressionStep(ApiModel):
    model_config = ConfigDict(
        json_schema_extra=validations(
            (
                "[has(self.prune), has(self.distill), has(self.quantize)].exists_one(given, given)",
                "a compression step must name one thing to do: prune, distill or quantize",
            )
        )
    )
    prune: Prune | None = None
    """Leave out hidden units and blocks."""
    distill: Distill | None = None
    """Win quality back by learning from the uncompressed model. Before quantize."""
    quantize: Quantize | None = None
    """Store weights in fewer bits. The last step."""


class GateMetric(ApiModel):
    model_config = ConfigDict(
        json_schema_extra=validations(
            (
                "double(self.margin) > 0.0",
                'margin must be above 0: it is the loss of quality you would accept, for example "0.02"',
            ),
            (
                "self.name != 'accuracy' || double(self.margin) < 1.0",
                'margin of accuracy is a share of the documents and must be below 1, for example "0.02"',
            ),
        )
    )
    name: Literal["loss", "accuracy"] = "loss"
    """loss: of each document, in nats per token. accuracy: share of the documents that get their own label."""
    margin: Decimal
    """The largest worsening that still counts as no worse, in the unit of the metric."""


class GoldenPrompt(ApiModel):
    """A prompt whose answer is looked at before anybody sees one."""

    prompt: Annotated[str, Field(min_length=1, max_length=4096)]
    """Text that the candidate continues, always with the likeliest token."""
    contains: Annotated[str, Field(max_length=1024)] = ""
    """Text that the answer must contain; empty accepts every answer that is not degenerate."""


class Fidelity(ApiModel):
    """How far a compressed model may be from its parent. Absent limits are reported and not enforced."""

    model_config = ConfigDict(
        json_schema_extra=validations(
            (
                "!has(self.maxFlips) || double(self.maxFlips) <= 1.0",
                'maxFlips is a share of the tokens and must be at most 1, for example "0.2"',
            ),
        )
    )
    max_kl: Decimal | None = None
    """Largest mean divergence KL(parent, candidate), in nats per token."""
    max_flips: Decimal | None = None
    """Largest share of the tokens for which parent and candidate rank different tokens first."""


class Gate(ApiModel):
    """The test that a candidate must pass before it serves."""

    model_config = ConfigDict(
        json_schema_extra=validations(
            (
                "double(self.confidence) > 0.5 && double(self.confidence) < 1.0",
                'confidence must lie between 0.5 and 1, for example "0.95"',
            ),
        )
    )
    dataset: DatasetRef
    """Public documents on which the candidate is compared with its parent, the live and the best model."""
    metrics: Annotated[list[GateMetric], Field(min_length=1, max_length=4)]
    """What must be no worse, and by how much."""
    confidence: Decimal = "0.95"
    """Confidence of the one-sided, paired test of non-inferiority, over all of its looks."""
    golden_prompts: Annotated[list[GoldenPrompt], Field(max_length=32)] = []
    """Prompts to answer; without any, beginnings of the data set's documents. Language models only."""
    fidelity: Fidelity = Fidelity()
    max_weight_bytes: Annotated[int, Field(ge=1)] | None = None
    """Largest size of the candidate's weight files, in bytes."""


class Drain(ApiModel):
    """How pods leave."""

    timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = 30
    """How long a pod that is going away may finish its open requests."""


class Serving(Placement):
    """How the model is served."""

    runtime: Literal["tributary"] = "tributary"
    """tributary: the OpenAI-compatible server of the worker image, for CPUs."""
    service_name: Name
    """Service that clients talk to. It always selects the stable revision."""
    port: Annotated[int, Field(ge=1, le=65535)] = 80
    """Port of the Service."""
    replicas: Annotated[int, Field(ge=0, le=1000)] = 1
    """Pods of the stable revision, and of a candidate."""
    resources: Resources = Resources()
    max_sequence_length: Annotated[int, Field(ge=2, le=1048576)] = 512
    """Prompt and completion together, in tokens."""
    drain: Drain = Drain()


class PostPromotion(ApiModel):
    """The watch after a switch."""

    analysis_seconds: Annotated[int, Field(ge=0, le=86400)] = 15
    """How long the new stable revision is watched after the switch."""


class BlueGreen(ApiModel):
    """Two full sets of pods, and one switch between them."""

    model_config = ConfigDict(
        json_schema_extra=validations(
            (
                "self.scaleDownDelaySeconds >= self.postPromotion.analysisSeconds",
                "scaleDownDelaySeconds must be at least postPromotion.analysisSeconds: going back must not need to start pods",
            ),
        )
    )
    promotion: Literal["Automatic", "Manual"] = "Automatic"
    """Automatic: a candidate that passed is switched to. Manual: it waits until promotedRevision names it."""
    promoted_revision: Annotated[str, Field(max_length=63)] = ""
    """Revision to switch to under manual promotion, as status.candidate.revision shows it."""
    scale_down_delay_seconds: Annotated[int, Field(ge=0, le=86400)] = 60
    """How long the old revision is kept warm after a switch."""
    progress_deadline_seconds: Annotated[int, Field(ge=1, le=86400)] = 600
    """A candidate that is not fully available after this time is rejected."""
    post_promotion: PostPromotion = PostPromotion()


class ReleaseStrategy(ApiModel):
    """How a new revision replaces the old one."""

    blue_green: BlueGreen = BlueGreen()


class ModelReleaseSpec(ApiModel):
    model_config = ConfigDict(
        json_schema_extra=validations(
            (
                "self.task != 'SequenceClassification' || self.gate.metrics.exists(m, m.name == 'accuracy')",
                "a classifier is gated on accuracy: add {name: accuracy} to gate.metrics",
            ),
            (
                "self.task == 'SequenceClassification' || self.gate.metrics.all(m, m.name == 'loss')",
                "a language model is gated on loss: set the name in gate.metrics to loss",
            ),
            (
                "self.task != 'SequenceClassification' || !has(self.gate.goldenPrompts) || self.gate.goldenPrompts.size() == 0",
                "a classifier answers no prompts: remove gate.goldenPrompts",
            ),
        )
    )
    model: ModelSource
    """The model to put into service."""
    task: TaskKind = TaskKind.CAUSAL_LM
    compression: Annotated[list[CompressionStep], Field(max_length=8)] = []
    """Steps in order; empty serves the model as it is."""
    gate: Gate
    serving: Serving
    strategy: ReleaseStrategy = ReleaseStrategy()


class Revision(ApiModel):
    """One model of a release, compressed and named by what it is made of."""

    revision: Annotated[str, Field(max_length=63)]
    """Short name, from the model's digest, the compression and the pod template."""
    model: ModelRef
    """What is served."""
    parent: ModelRef
    """What it was compressed from."""
    bytes: int = 0
    """Size of the weight files."""
    parent_bytes: int = 0
    """Size of the parent's weight files."""
    metrics: Annotated[list[Metric], Field(max_length=32)] = []
    """Measured by the gate."""
    bar: Digest | None = None
    """Digest of the best model until then, which the gate compared this one with."""
    promoted_at: datetime | None = None
    """When it began to serve."""


class Transition(ApiModel):
    """A switch, recorded before it is made."""

    from_revision: Annotated[str, Field(max_length=63)] = ""
    """The revision that served before; empty for the first."""
    to_revision: Annotated[str, Field(max_length=63)]
    """The revision that serves after."""
    intended_at: datetime
    """When the switch was decided."""
    switched_at: datetime | None = None
    """When the Service was switched."""


class RejectedRevision(ApiModel):
    revision: Annotated[str, Field(max_length=63)]
    """The candidate."""
    stable: Annotated[str, Field(max_length=63)] = ""
    """The revision it was compared with; a verdict holds for a pair."""
    reason: Annotated[str, Field(max_length=128)]
    """Why, in one word."""
    message: Annotated[str, Field(max_length=1024)] = ""
    """Why, in a sentence, with what to change."""


class ModelReleaseStatus(ApiModel):
    observed_generation: int = 0
    """The generation of the spec that this status is about."""
    conditions: Conditions = waiting("Ready")
    """Ready is about the stable revision; Stalled says why a candidate does not replace it."""
    replicas: int = 0
    """Pods of the stable revision, for the scale subresource."""
    selector: Annotated[str, Field(max_length=512)] = ""
    """Selector of these pods, for the scale subresource."""
    model: ModelRef | None = None
    """The model that the spec names, resolved. It stays when the round that made it is deleted."""
    stable: Revision | None = None
    """The revision that serves."""
    candidate: Revision | None = None
    """The revision on its way to service."""
    best: Revision | None = None
    """Of all revisions that served, the one with the least loss: every candidate is compared with it as well."""
    transition: Transition | None = None
    """The last switch."""
    spec_hash: Annotated[str, Field(max_length=64)] = ""
    """Of the spec but for replicas, Service and port. When it changes, a rejected candidate gets another chance."""
    rejected_revisions: Annotated[list[RejectedRevision], Field(max_length=10)] = []
    """Candidates that did not pass, the latest first."""
    history: Annotated[list[Revision], Field(max_length=10)] = []
    """Earlier stable revisions, the latest first."""


class ModelRelease(ApiModel):
    """A language model in service: compressed, proven no worse than the live one, switched blue-green."""

    KIND: ClassVar[str] = "ModelRelease"
    PLURAL: ClassVar[str] = "modelreleases"
    SHORT_NAMES: ClassVar[list[str]] = ["mrel"]
    COLUMNS: ClassVar[list[tuple[str, str, str]]] = [
        ("Ready", "string", '.status.conditions[?(@.type=="Ready")].status'),
        ("Reason", "string", '.status.conditions[?(@.type=="Ready")].reason'),
        ("Stable", "string", ".status.stable.revision"),
        ("Candidate", "string", ".status.candidate.revision"),
        ("Service", "string", ".spec.serving.serviceName"),
        ("Age", "date", ".metadata.creationTimestamp"),
    ]

    metadata: ObjectMeta
    spec: ModelReleaseSpec
    """Which model to serve, how to compress it, what it must prove and how to switch."""
    status: ModelReleaseStatus = ModelReleaseStatus()
    """What the operator saw last. Written by the operator only."""

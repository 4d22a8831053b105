"""FederatedClient: a data owner's consent, data, resources and privacy budget."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from tributary_api.base import ApiModel, DataUri, Decimal, ImageReference, Name, PublicKey, S3Uri, validations
from tributary_api.meta import Conditions, ObjectMeta, waiting
from tributary_api.shared import Placement, Resources, SecretName, Store

WORKER_SERVICE_ACCOUNT = "tributary-worker"


class ClientData(ApiModel):
    """Where this owner's text lies. It never leaves the namespace."""

    name: Annotated[
        Name,
        Field(
            json_schema_extra=validations(
                (
                    "self == oldSelf",
                    "immutable: it is the data set's identity in the privacy ledger; create another FederatedClient for another data set",
                )
            )
        ),
    ]
    """Name of the data set; with the namespace, its identity in the privacy ledger. Immutable."""
    uri: DataUri
    """Folder or object, s3://bucket/prefix/ or pvc://claim/path."""
    format: Literal["jsonl", "parquet", "text"] = "jsonl"
    """jsonl and parquet: one record per line or row; text: one record per file."""
    text_field: Annotated[str, Field(max_length=128)] = "text"
    """Field that holds a record's text."""
    label_field: Annotated[str, Field(max_length=128)] | None = None
    """Field that holds a record's label, an integer from 0; only for classification."""
    num_examples: Annotated[int, Field(ge=1, le=10**9)]
    """Declared number of training records: public, the N of the privacy accountant and the weight in averaging. More records are cut, by their places; fewer are padded."""
    holdout_fraction: Decimal = "0.1"
    """Part of the records kept apart from training, chosen by each record's place (object key and line, row or file), never by its content: the same in every round."""
    store: Store | None = None
    """Store of the data, if it is not the exchange store of spec.store."""


class HubConsent(ApiModel):
    namespace: Name
    """Namespace of a hub whose rounds this owner takes part in."""
    public_key: PublicKey | None = None
    """The hub's public key, as the hub's admin tells it; status.hubKey shows the one in use. Workers then refuse grants that another key signed."""


class Consent(ApiModel):
    """Who may train on this data, and until when."""

    hubs: Annotated[list[HubConsent], Field(min_length=1, max_length=64)]
    """Hubs that may ask this client to train."""
    expires: datetime
    """No worker starts after this time, and a running one is stopped."""


class PrivacyBudget(ApiModel):
    """What all rounds together may spend on this data set."""

    model_config = ConfigDict(
        json_schema_extra=validations(
            ("double(self.epsilon) > 0.0", 'epsilon must be above 0, for example "8"'),
            (
                "double(self.delta) > 0.0 && double(self.delta) < 1.0",
                'delta must be above 0 and below 1, for example "1e-6"',
            ),
        )
    )
    epsilon: Decimal
    """Total ε that all rounds on this data set may ever spend together."""
    delta: Decimal
    """The δ at which ε is stated."""


class ClientPrivacy(ApiModel):
    """The privacy budget of the data set, and where its ledger is kept."""

    model_config = ConfigDict(
        json_schema_extra=validations(
            ("double(self.maxRoundEpsilon) > 0.0", "maxRoundEpsilon must be above 0"),
        )
    )
    budget: PrivacyBudget
    max_round_epsilon: Decimal
    """No single round may ask for more than this ε."""
    ledger_uri: Annotated[
        S3Uri,
        Field(
            json_schema_extra=validations(
                ("self == oldSelf", "immutable: a new ledger would forget what was spent")
            )
        ),
    ]
    """Folder of the append-only privacy ledger of this data set, in a bucket that this owner chose. Immutable."""
    noise_key_secret: SecretName = "tributary-noise-key"
    """Secret of this namespace whose entry `key` (32 random bytes) keys the noise and signs receipts; the hub can never read it."""
    receipt_key: PublicKey | None = None
    """Public key of this owner's receipts, as `tributary privacy key` prints it. Given, a receipt that another key signed is refused."""


class WorkerSpec(Placement):
    """How this owner's workers run."""

    nodes: Annotated[int, Field(ge=1, le=64)] = 1
    """Number of worker pods of one training."""
    processes_per_node: Annotated[int, Field(ge=1, le=16)] = 1
    """Processes in each pod, usually one for each GPU."""
    resources: Resources = Resources()
    """Requests and limits of each worker pod."""
    queue_name: Annotated[str, Field(max_length=63)] = ""
    """Kueue local queue for the Jobs; empty for none."""
    allowed_images: Annotated[list[ImageReference], Field(min_length=1, max_length=32)]
    """Worker images that may see the data, pinned by digest. Anything else is refused at admission."""


class FederatedClientSpec(ApiModel):
    data: ClientData
    store: Store
    """Exchange store: models, this client's deltas and the ledger."""
    consent: Consent
    privacy: ClientPrivacy
    worker: WorkerSpec
    suspend: bool = False
    """Takes part in no round while true; running workers are stopped."""


class ClientPrivacyStatus(ApiModel):
    """What the ledger says, composed by the accountant at the budget's δ."""

    spent_epsilon: str = ""
    """ε of all rounds that started on this data set."""
    reserved_epsilon: str = ""
    """Further ε that is set aside for rounds that have not started."""
    remaining_epsilon: str = ""
    """Budget less spent and reserved."""
    rounds: Annotated[int, Field(ge=0)] = 0
    """Rounds that the ledger knows."""
    ledger_entries: Annotated[int, Field(ge=0)] = 0
    """Length of the ledger when it was last read. A shorter one is refused."""
    ledger_head: Annotated[str, Field(max_length=71)] = ""
    """Digest of the last entry."""


class FederatedClientStatus(ApiModel):
    observed_generation: int = 0
    """The generation of the spec that this status is about."""
    conditions: Conditions = waiting("Ready")
    """Ready: whether rounds can count on this client, and if not, why."""
    privacy: ClientPrivacyStatus = ClientPrivacyStatus()
    hub_key: Annotated[str, Field(max_length=72)] = ""
    """Public key of the operator that writes this status. Compare it with what the hub's admin says, then name it in spec.consent.hubs."""


class FederatedClient(ApiModel):
    """A data owner's consent, data, resources and privacy budget. It lives in the owner's namespace."""

    KIND: ClassVar[str] = "FederatedClient"
    PLURAL: ClassVar[str] = "federatedclients"
    SHORT_NAMES: ClassVar[list[str]] = ["fclient"]
    COLUMNS: ClassVar[list[tuple[str, str, str]]] = [
        ("Ready", "string", '.status.conditions[?(@.type=="Ready")].status'),
        ("Reason", "string", '.status.conditions[?(@.type=="Ready")].reason'),
        ("Spent", "string", ".status.privacy.spentEpsilon"),
        ("Reserved", "string", ".status.privacy.reservedEpsilon"),
        ("Remaining", "string", ".status.privacy.remainingEpsilon"),
        ("Rounds", "integer", ".status.privacy.rounds"),
        ("Expires", "string", ".spec.consent.expires"),
        ("Age", "date", ".metadata.creationTimestamp"),
    ]

    metadata: ObjectMeta
    spec: FederatedClientSpec
    """What the data owner offers and allows."""
    status: FederatedClientStatus = FederatedClientStatus()
    """What the operator saw last. Written by the operator only."""

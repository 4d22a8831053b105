"""What a reconcile may ask of the world, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, Literal, TypeVar

from kubernetes.aio.client import V1Deployment, V1Job, V1PodDisruptionBudget, V1Service

from tributary_api.base import ApiModel
from tributary_api.records import LedgerKind, PlannedClient
from tributary_operator.kinds import Kind

Manifest = V1Job | V1Service | V1Deployment | V1PodDisruptionBudget
"""Created once. What changes later, a Service's selector or a number of pods, is a JsonPatch."""

POLL_AFTER = timedelta(seconds=30)
"""Children and objects wake a daemon; polling only covers what has no events, the object store."""

AT_ONCE = timedelta(0)


@dataclass(frozen=True, slots=True)
class PutRecord:
    """A create-only object in the exchange bucket."""

    uri: str
    body: ApiModel


@dataclass(frozen=True, slots=True)
class LedgerRecord:
    """An entry in a client's privacy ledger. Repeating it changes nothing."""

    kind: LedgerKind
    planned: PlannedClient
    reason: str = ""


Record = PutRecord | LedgerRecord


@dataclass(frozen=True, slots=True)
class JsonPatch:
    """Operations (RFC 6902) on one child; a `test` among them makes it a compare-and-swap."""

    kind: Kind
    namespace: str
    name: str
    operations: tuple[dict[str, Any], ...]


Apply = Manifest | JsonPatch


@dataclass(frozen=True, slots=True)
class Delete:
    """One child, with the UID it had when it was seen: a namesake created since is left alone."""

    kind: Kind
    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, for people. Emitted on transitions only."""

    reason: str
    message: str
    type: Literal["Normal", "Warning"] = "Normal"


@dataclass(frozen=True, slots=True)
class Done:
    """The step's artefact exists. Look at the next step."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """The step is under way. `record`, `apply` and `delete` bring it on.

    With `stalled`, a human or another object must change something; it is looked at again all the same.
    """

    reason: str
    message: str
    record: tuple[Record, ...] = ()
    apply: tuple[Apply, ...] = ()
    delete: tuple[Delete, ...] = ()
    poll_after: timedelta = POLL_AFTER
    stalled: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """Retrying cannot help; for a round this is the end."""

    reason: str
    message: str


Outcome = Done | Waiting | Failed

StatusT_co = TypeVar("StatusT_co", bound=ApiModel, covariant=True)


@dataclass(frozen=True, slots=True)
class Decision(Generic[StatusT_co]):
    """One pass, carried out in this order; it stops at the first failure."""

    record: tuple[Record, ...]
    apply: tuple[Apply, ...]
    delete: tuple[Delete, ...]
    status: StatusT_co
    events: tuple[Event, ...] = ()
    poll_after: timedelta | None = None

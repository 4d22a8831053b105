"""What a pass could not do, as a condition: every exception has a reason that people can act on."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from tributary_accounting.ledger import LedgerBroken
from tributary_operator.accounting import AccountantDied
from tributary_operator.api import Conflict, Forbidden, Invalid, Unreachable
from tributary_operator.conditions import Progress
from tributary_operator.store import RecordUnreadable
from tributary_store.errors import AccessDenied, ObjectMissing, StoreError, StoreUnreachable


@dataclass(frozen=True, slots=True)
class Trouble:
    reason: str
    message: str
    progress: Progress
    """Stalled when a human must change something; it is tried again all the same, only more slowly."""


_REASONS: tuple[tuple[type[Exception], str, Progress], ...] = (
    (StoreUnreachable, "StoreUnreachable", "progressing"),
    (AccessDenied, "StoreDenied", "stalled"),
    (ObjectMissing, "StoreObjectMissing", "stalled"),
    (StoreError, "StoreFailed", "progressing"),
    (LedgerBroken, "LedgerBroken", "stalled"),
    (RecordUnreadable, "RecordUnreadable", "stalled"),
    (Forbidden, "NoAccess", "stalled"),
    (Invalid, "Refused", "stalled"),
    (Conflict, "Conflict", "progressing"),
    (Unreachable, "ApiServerUnavailable", "progressing"),
    # An object that passed an older admission, or none: its owner must correct it.
    (ValidationError, "SpecInvalid", "stalled"),
    (AccountantDied, "AccountantDied", "progressing"),
)


def trouble(error: Exception) -> Trouble:
    """The first row that fits; anything else is a fault of the operator, and says so."""
    for kind, reason, progress in _REASONS:
        if isinstance(error, kind):
            return Trouble(reason, str(error), progress)
    return Trouble("InternalError", f"{type(error).__name__}: {error}; see the operator's log", "progressing")

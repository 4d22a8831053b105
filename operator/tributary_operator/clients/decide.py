"""Decide what a FederatedClient's status says: consent, data set, and what the ledger has recorded."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from tributary_api.client import ClientPrivacyStatus, FederatedClient, FederatedClientStatus
from tributary_operator import conditions
from tributary_operator.accounting import Account
from tributary_operator.decision import Decision

EXPIRY_NEAR = timedelta(minutes=10)
RESERVED_POLL_AFTER = timedelta(seconds=30)
"""A reservation becomes a launch in the ledger, by the worker's hand: no event tells of it."""


@dataclass(frozen=True, slots=True)
class ObservedClient:
    account: Account | None = None
    """None if the ledger could not be read."""
    ledger_problem: str = ""
    ledger_reason: str = ""
    data_overlaps: str = ""
    """Older client with overlapping data, as namespace/name."""
    hub_key: str = ""
    """Public key of this operator's grants."""


@dataclass(frozen=True, slots=True)
class Verdict:
    is_ready: bool
    reason: str
    message: str
    is_stalled: bool = False


def decide(client: FederatedClient, seen: ObservedClient, now: datetime) -> Decision[FederatedClientStatus]:
    verdict = judge(client, seen, now)
    old = client.status
    new = conditions.summary(
        "stalled" if verdict.is_stalled else "done",
        "True" if verdict.is_ready else "False",
        verdict.reason,
        verdict.message,
        generation=client.metadata.generation,
        now=now,
    )
    merged = conditions.merged(old.conditions, new)
    return Decision(
        record=(),
        apply=(),
        delete=(),
        status=FederatedClientStatus(
            observed_generation=client.metadata.generation,
            conditions=merged,
            privacy=old.privacy if seen.account is None else privacy(client, seen.account),
            hub_key=seen.hub_key,
        ),
        events=conditions.transition(old.conditions, merged),
        poll_after=_poll_after(client, seen.account, now),
    )


def judge(client: FederatedClient, seen: ObservedClient, now: datetime) -> Verdict:
    """The first rule that speaks."""
    consent, budget = client.spec.consent, client.spec.privacy.budget
    if client.spec.suspend:
        return Verdict(False, "Suspended", "spec.suspend is true: takes part in no round")
    if now >= consent.expires:
        return Verdict(False, "ConsentExpired", f"spec.consent.expires was {consent.expires.isoformat()}")
    if seen.data_overlaps:
        message = f"spec.data overlaps with {seen.data_overlaps}, which is older: delete one of the two"
        return Verdict(False, "OverlappingData", message, is_stalled=True)
    if seen.account is None:
        return Verdict(False, seen.ledger_reason, seen.ledger_problem, is_stalled=True)
    if seen.account.charged_epsilon >= float(budget.epsilon):
        message = f"epsilon {seen.account.charged_epsilon:.2f} of {budget.epsilon} is spent or reserved"
        return Verdict(False, "BudgetExhausted", message)
    hubs = ", ".join(sorted(hub.namespace for hub in consent.hubs))
    return Verdict(True, "Consenting", f"takes part in rounds of {hubs} until {consent.expires.isoformat()}")


def privacy(client: FederatedClient, account: Account) -> ClientPrivacyStatus:
    spent, charged = account.launched_epsilon, account.charged_epsilon
    remaining = max(0.0, float(client.spec.privacy.budget.epsilon) - charged)
    return ClientPrivacyStatus(
        spent_epsilon=_decimal(spent),
        reserved_epsilon=_decimal(max(0.0, charged - spent)),
        remaining_epsilon=_decimal(remaining),
        rounds=len({entry.run_key for entry in account.chain.entries}),
        ledger_entries=len(account.chain.entries),
        ledger_head=account.chain.head,
    )


def _decimal(value: float) -> str:
    return f"{value:.3f}"


def _poll_after(client: FederatedClient, account: Account | None, now: datetime) -> timedelta | None:
    """When something changes without an event; None leaves it to the resync."""
    left = client.spec.consent.expires - now
    near = [left] if timedelta(0) < left < EXPIRY_NEAR else []
    is_reserved = account is not None and account.charged_epsilon > account.launched_epsilon
    return min([*near, *([RESERVED_POLL_AFTER] if is_reserved else [])], default=None)

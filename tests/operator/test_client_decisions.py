"""The status of a FederatedClient: consent, data set, ledger."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from round_worlds import BASE, SETTINGS, T0, a_client, a_round, nn

from tributary_accounting.ledger import Chain
from tributary_api.records import LedgerEntry, LedgerKind
from tributary_operator import conditions
from tributary_operator.accounting import Account
from tributary_operator.clients.decide import ObservedClient, decide
from tributary_operator.rounds.planning import grant

LEDGER = Account(Chain(), 0.0, 0.0)


def entry(n: int, kind: LedgerKind) -> LedgerEntry:
    granted = grant(a_round(), a_client(), BASE, 0.8, SETTINGS.layout)
    return LedgerEntry(
        n=n,
        kind=kind,
        data_set=nn("a"),
        client=nn("a"),
        run_key=granted.run_key,
        grant_digest=granted.digest,
        hub_namespace="hub",
        mechanism=granted.mechanism,
        delta="1e-6",
        recorded_at=T0,
    )


@pytest.mark.parametrize(
    ("spec", "seen", "reason", "ready", "stalled"),
    [
        ({}, ObservedClient(LEDGER), "Consenting", "True", "False"),
        ({"suspend": True}, ObservedClient(LEDGER), "Suspended", "False", "False"),
        (
            {"consent": {"hubs": [{"namespace": "hub"}], "expires": T0.isoformat()}},
            ObservedClient(LEDGER),
            "ConsentExpired",
            "False",
            "False",
        ),
        ({}, ObservedClient(LEDGER, data_overlaps="a/x"), "OverlappingData", "False", "True"),
        ({}, ObservedClient(Account(Chain(), 8.0, 3.0)), "BudgetExhausted", "False", "False"),
        (
            {},
            ObservedClient(ledger_reason="LedgerBroken"),
            "LedgerBroken",
            "False",
            "True",
        ),
    ],
)
def test_decide(spec: dict[str, Any], seen: ObservedClient, reason: str, ready: str, stalled: str) -> None:
    decision = decide(a_client(**spec), seen, T0)
    flags = {c.type: c.status for c in decision.status.conditions}
    found = conditions.find(decision.status.conditions, conditions.READY)
    assert found is not None
    assert (found.reason, found.status, flags["Stalled"]) == (reason, ready, stalled)
    assert [event.reason for event in decision.events] == [reason]


def test_the_status_repeats_the_ledger() -> None:
    chain = Chain((entry(0, LedgerKind.RESERVE), entry(1, LedgerKind.LAUNCH)))
    privacy = decide(a_client(), ObservedClient(Account(chain, 5.0, 3.5)), T0).status.privacy
    assert (privacy.spent_epsilon, privacy.reserved_epsilon, privacy.remaining_epsilon) == (
        "3.500",
        "1.500",
        "3.000",
    )
    assert (privacy.rounds, privacy.ledger_entries, privacy.ledger_head) == (1, 2, chain.head)


def test_what_was_known_is_kept_while_the_ledger_cannot_be_read() -> None:
    known = decide(
        a_client(), ObservedClient(Account(Chain((entry(0, LedgerKind.RESERVE),)), 5.0, 0.0)), T0
    ).status
    client = a_client().model_copy(update={"status": known})
    after = decide(
        client, ObservedClient(ledger_reason="LedgerUnreachable", ledger_problem="no answer"), T0
    ).status
    assert after.privacy == known.privacy


def test_it_looks_again_when_the_consent_expires() -> None:
    soon = a_client(
        consent={"hubs": [{"namespace": "hub"}], "expires": (T0 + timedelta(minutes=2)).isoformat()}
    )
    assert decide(soon, ObservedClient(LEDGER), T0).poll_after == timedelta(minutes=2)
    assert decide(a_client(), ObservedClient(LEDGER), T0).poll_after is None


def test_a_reservation_is_looked_at_until_a_worker_has_launched_it() -> None:
    waiting = decide(a_client(), ObservedClient(Account(Chain(), 5.0, 3.5)), T0)
    launched = decide(a_client(), ObservedClient(Account(Chain(), 5.0, 5.0)), T0)
    assert waiting.poll_after == timedelta(seconds=30)
    assert launched.poll_after is None

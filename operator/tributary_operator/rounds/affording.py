"""How often the cohort's budgets could pay for a round like this one: shown before anything is reserved."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress

from tributary_accounting.ledger import LedgerBroken
from tributary_api.client import FederatedClient
from tributary_api.meta import NamespacedName
from tributary_api.records import RoundPlan
from tributary_operator.reconciler import World
from tributary_store.errors import StoreError, StoreUnreachable

ROUNDS_COUNTED_MAX = 100
ASKING_SECONDS_MAX = 60
"""A composition takes seconds, and there may be hundreds of clients."""


async def affordable_rounds(
    world: World, plan: RoundPlan, clients: Mapping[NamespacedName, FederatedClient]
) -> int | None:
    """By the tightest budget, this round included; None if no ledger can be read, or if it takes too long.

    Nothing waits for it: it is advice, and every reservation looks at its own budget.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(ASKING_SECONDS_MAX):
            return await _fewest(world, plan, clients)
    return None


async def _fewest(
    world: World, plan: RoundPlan, clients: Mapping[NamespacedName, FederatedClient]
) -> int | None:
    """One after the other: each client is only asked whether it affords as many as those before it."""
    fewest: int | None = None
    for planned in plan.cohort:
        client = clients.get(planned.client)
        if client is None:
            continue
        at_most = ROUNDS_COUNTED_MAX if fewest is None else fewest
        try:
            fewest = await world.accounting.runs_within(
                client, planned.grant.mechanism, besides=plan.run_key, at_most=at_most
            )
        except StoreUnreachable:
            raise
        except (LedgerBroken, StoreError):
            continue  # the reservation will say so, of this client
    return fewest

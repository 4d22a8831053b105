"""The daemon of a FederatedClient. It starts nothing and sets no finalizer: it says what the ledger says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tributary_accounting.ledger import LedgerBroken
from tributary_api.client import FederatedClient
from tributary_operator.api import JsonObject
from tributary_operator.clients.decide import ObservedClient, decide
from tributary_operator.clients.reading import readable
from tributary_operator.kinds import CLIENT
from tributary_operator.reconciler import Pass, World, carry_out
from tributary_operator.rounds.eligibility import name_of, overlapping
from tributary_store.errors import StoreError


class ClientReconciler:
    kind = CLIENT
    has_finalizer = False

    def __init__(self, world: World, everyone: Callable[[], list[JsonObject]]) -> None:
        self._world = world
        self._everyone = everyone

    async def run_pass(self, raw: JsonObject) -> Pass:
        client = FederatedClient.model_validate(raw)
        seen = await self._observe(client)
        return await carry_out(self._world, CLIENT, raw, decide(client, seen, self._world.clock()))

    async def clean_up(self, raw: JsonObject) -> list[str]:  # noqa: ARG002 - nothing is left behind
        return []

    def forget(self, raw: JsonObject) -> None:
        """Nothing is remembered."""

    async def _observe(self, client: FederatedClient) -> ObservedClient:
        seen = ObservedClient(
            data_overlaps=str(overlapping(self._neighbours(client)).get(name_of(client), "")),
            hub_key=self._world.settings.signing_key.public,
        )
        try:
            return replace(seen, account=await self._world.accounting.account(client))
        except LedgerBroken as error:
            return replace(seen, ledger_reason="LedgerBroken", ledger_problem=str(error))
        except StoreError as error:
            return replace(seen, ledger_reason="LedgerUnreachable", ledger_problem=str(error))

    def _neighbours(self, client: FederatedClient) -> list[FederatedClient]:
        """All clients of the namespace that have been seen, this one as it is now."""
        namespace = client.metadata.namespace
        near = [raw for raw in self._everyone() if raw["metadata"]["namespace"] == namespace]
        return [client, *(other for other in readable(near) if name_of(other) != name_of(client))]

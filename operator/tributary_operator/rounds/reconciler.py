"""The daemon of a FederatedRound: observe, decide, carry out."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable

import structlog

from tributary_accounting.ledger import LedgerBroken, LedgerRefused
from tributary_api.client import FederatedClient
from tributary_api.meta import NamespacedName
from tributary_api.records import LedgerKind, PlannedClient, RoundPlan
from tributary_api.round import FederatedRound
from tributary_operator import names
from tributary_operator.accounting import BudgetExceeded, LedgerRef
from tributary_operator.api import ApiError, Forbidden, Invalid, JsonObject
from tributary_operator.decision import Apply, Delete, LedgerRecord
from tributary_operator.kinds import CLIENT, JOB, ROUND, SERVICE
from tributary_operator.reconciler import Pass, World, carry_out
from tributary_operator.rounds.decide import decide
from tributary_operator.rounds.eligibility import failure
from tributary_operator.rounds.observe import Memory, observe
from tributary_operator.rounds.planning import data_set
from tributary_operator.rounds.situation import Situation
from tributary_operator.rounds.training import ACCESS_LOST_AFTER
from tributary_store.errors import AccessDenied, ObjectMissing, StoreError

QUOTA = "exceeded quota"
"""How the API server words a refusal that passes by itself."""
NAMESPACES_AT_ONCE = 16

log = structlog.get_logger()


class RoundReconciler:
    kind = ROUND
    has_finalizer = True

    def __init__(self, world: World) -> None:
        self._world = world
        self._memory: dict[str, Memory] = defaultdict(Memory)
        self._waiting: dict[str, set[str]] = defaultdict(set)
        """Rounds that start from another round's model, by that round."""

    async def run_pass(self, raw: JsonObject) -> Pass:
        fedround = FederatedRound.model_validate(raw)
        owner = _owner(fedround.metadata.namespace, fedround.metadata.name)
        memory = self._memory[fedround.run_key]
        self._note_base(fedround, owner)
        seen = await observe(self._world, fedround, owner, memory)
        decision = decide(Situation(fedround, seen, self._world.settings, self._world.clock()))
        done = await carry_out(self._world, ROUND, raw, decision, _Effects(self._world, memory))
        if seen.outcome is not None:
            for waiting in self._waiting.pop(owner, ()):
                self._world.wake(waiting)
        return done

    def _note_base(self, fedround: FederatedRound, owner: str) -> None:
        source = fedround.spec.base_model.round_ref
        if source is not None:
            self._waiting[_owner(fedround.metadata.namespace, source.name)].add(owner)

    async def clean_up(self, raw: JsonObject) -> list[str]:
        """Removes the children in all namespaces of the cohort; plan, ledger and outcome stay for ever."""
        fedround = FederatedRound.model_validate(raw)
        layout = self._world.settings.layout
        try:
            plan = await self._world.records.find(layout.plan(fedround.run_key), RoundPlan)
        except StoreError as error:
            return [f"all children (the plan cannot be read: {error})"]
        cohort = plan.cohort if plan is not None else []
        namespaces = {fedround.metadata.namespace, *(planned.client.namespace for planned in cohort)}
        left = await self._remove(fedround.run_key, sorted(namespaces))
        self._memory.pop(fedround.run_key, None)
        return left

    def forget(self, raw: JsonObject) -> None:
        """The clean-up has forgotten the run."""

    async def _remove(self, run_key: str, namespaces: Iterable[str]) -> list[str]:
        gate = asyncio.Semaphore(NAMESPACES_AT_ONCE)

        async def remove(namespace: str) -> str | None:
            async with gate:
                try:
                    await _remove_children(self._world, namespace, run_key)
                except ApiError as error:
                    return f"{namespace} ({error})"
                return None

        found = await asyncio.gather(*(remove(namespace) for namespace in namespaces))
        return [text for text in found if text is not None]


def _owner(namespace: str, name: str) -> str:
    return names.owner(ROUND.kind, namespace, name)


async def _remove_children(world: World, namespace: str, run_key: str) -> None:
    labels = {names.MANAGED_BY: names.MANAGED_BY_VALUE, names.RUN_KEY: run_key}
    for kind in (JOB, SERVICE):
        items, _ = await world.cluster.find(kind, namespace, labels)
        for item in items:
            metadata = item["metadata"]
            await world.cluster.delete(Delete(kind, namespace, metadata["name"], metadata["uid"]))


class _Effects:
    """Writes ledger entries, and turns what one client refuses into a fact about that client alone."""

    def __init__(self, world: World, memory: Memory) -> None:
        self._world = world
        self._memory = memory

    async def record(self, entry: LedgerRecord) -> None:
        """A store that does not answer stops the pass; a ledger that says no costs the round one client."""
        try:
            await self._write(entry)
        except (BudgetExceeded, LedgerRefused, LedgerBroken, AccessDenied, ObjectMissing) as error:
            self._refuse(entry.planned.client, _reason(error), str(error), entry.kind)
        else:
            done = self._memory.reserved if entry.kind is LedgerKind.RESERVE else self._memory.closed
            done.add(entry.planned.client)
        client = entry.planned.client
        self._world.wake(names.owner(CLIENT.kind, client.namespace, client.name))

    async def _write(self, entry: LedgerRecord) -> None:
        planned, accounting = entry.planned, self._world.accounting
        ref = LedgerRef(planned.ledger_uri, data_set(planned))
        if entry.kind is not LedgerKind.RESERVE:
            await accounting.close_run(entry.kind, ref, planned.grant, entry.reason)
            return
        client = await self._client(planned)
        budget, mirror = client.spec.privacy.budget, client.status.privacy
        await accounting.reserve(ref, planned.grant, budget, mirror)

    async def _client(self, planned: PlannedClient) -> FederatedClient:
        namespace, name = planned.client.namespace, planned.client.name
        raw = self._world.cached(CLIENT, namespace, name) or await self._world.cluster.get(
            CLIENT, namespace, name
        )
        if raw is None:
            raise LedgerRefused(f"FederatedClient {planned.client} does not exist any more")
        return FederatedClient.model_validate(raw)

    def _refuse(self, client: NamespacedName, reason: str, message: str, kind: LedgerKind) -> None:
        log.warning("ledger refused", client=str(client), kind=kind.value, reason=reason, error=message)
        if kind is LedgerKind.RESERVE:
            self._memory.refused[client] = failure(client, reason, message)
        else:  # what cannot be closed stays charged: more than was spent, never less
            self._memory.closed.add(client)

    def refused(self, child: Apply, error: ApiError) -> bool:
        """Whether the refusal concerns one client alone. One for a quota passes, so it is no verdict."""
        labels = getattr(getattr(child, "metadata", None), "labels", None) or {}
        if not isinstance(error, Forbidden | Invalid) or names.CLIENT not in labels:
            return False
        client = NamespacedName(namespace=child.metadata.namespace, name=labels[names.CLIENT])  # type: ignore[union-attr]
        log.warning("worker refused", client=str(client), error=str(error))
        if QUOTA not in str(error) and not self._may_pass(child, error):
            reason = "NoAccess" if isinstance(error, Forbidden) else "WorkerRefused"
            self._memory.refused[client] = failure(client, reason, str(error))
            self._wake_round(child)
        return True

    def _may_pass(self, child: Apply, error: ApiError) -> bool:
        """A Job that has been forbidden for a short time only is asked for again."""
        if not isinstance(error, Forbidden):
            return False
        now, name = self._world.clock(), str(child.metadata.name)  # type: ignore[union-attr]
        since = self._memory.forbidden.setdefault(name, now)
        return now - since < ACCESS_LOST_AFTER

    def _wake_round(self, child: Apply) -> None:
        annotations = getattr(getattr(child, "metadata", None), "annotations", None) or {}
        self._world.wake(annotations.get(names.OWNER, ""))


_REASONS: tuple[tuple[type[Exception], str], ...] = (
    (BudgetExceeded, "BudgetExceeded"),
    (LedgerRefused, "LedgerRefused"),
    (LedgerBroken, "LedgerBroken"),
)


def _reason(error: Exception) -> str:
    return next((reason for kind, reason in _REASONS if isinstance(error, kind)), "LedgerUnreachable")

"""The privacy accountant and the ledgers, for an event loop: computed in other processes, remembered."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import ParamSpec, TypeVar

from tributary_accounting import accountant
from tributary_accounting.ledger import EMPTY, BudgetExceeded, Chain, Ledger, LedgerBroken
from tributary_api.client import ClientPrivacyStatus, FederatedClient, PrivacyBudget
from tributary_api.meta import NamespacedName
from tributary_api.records import Grant, LedgerKind, MechanismSpec
from tributary_api.shared import StoreEndpoint
from tributary_operator import metrics
from tributary_operator.store import Records
from tributary_store.objectstore import ObjectStore

P = ParamSpec("P")
R = TypeVar("R")


class AccountantDied(Exception):
    """The process that computes ε was killed, most likely for lack of memory; it is started again."""


@dataclass(frozen=True, slots=True)
class Training:
    """The public numbers that σ follows from."""

    num_examples: int
    expected_batch_size: int
    steps: int
    epsilon: str
    delta: str


@dataclass(frozen=True, slots=True)
class Account:
    """What a ledger says at its budget's δ."""

    chain: Chain
    charged_epsilon: float
    """All that was reserved and not released."""
    launched_epsilon: float
    """What of it a worker has started."""


@dataclass(frozen=True, slots=True)
class LedgerRef:
    uri: str
    data_set: NamespacedName

    @classmethod
    def of(cls, client: FederatedClient) -> LedgerRef:
        data_set = NamespacedName(namespace=client.metadata.namespace, name=client.spec.data.name)
        return cls(client.spec.privacy.ledger_uri, data_set)


def _clock() -> datetime:
    return datetime.now(UTC)


def _end_with_parent() -> None:
    """An operator that is killed cannot tell its processes to go."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@cache
def _store_of_process(endpoint: StoreEndpoint) -> ObjectStore:
    """One connection pool for each accountant process."""
    return ObjectStore.open(endpoint)


def _reserve(
    endpoint: StoreEndpoint, ref: LedgerRef, grant: Grant, budget: PrivacyBudget, known: Chain
) -> Chain:
    return Ledger(_store_of_process(endpoint), ref.uri, ref.data_set, _clock).reserve(grant, budget, known)


def _sigma(training: Training) -> float:
    return accountant.noise_multiplier(
        training.num_examples,
        training.expected_batch_size,
        training.steps,
        float(training.epsilon),
        float(training.delta),
    )


def _check_mirror(mirror: ClientPrivacyStatus, chain: Chain, ref: LedgerRef) -> None:
    """The client's status remembers the chain even when the operator has been restarted."""
    length = mirror.ledger_entries
    if length == 0:
        return
    if len(chain.entries) < length or chain.entries[length - 1].digest != mirror.ledger_head:
        raise LedgerBroken(f"{ref.uri} had {length} entries and is shorter or different now: restore it")


class Accounting:
    """σ, ε and ledger entries. It remembers chains, so that one that was shortened is noticed."""

    def __init__(self, endpoint: StoreEndpoint, store: ObjectStore, records: Records, processes: int) -> None:
        self._endpoint = endpoint
        self.store = store
        self._records = records
        self._processes = processes
        self._pool = self._new_pool()
        self._sigmas: dict[Training, asyncio.Task[float]] = {}
        self._epsilons: dict[tuple[tuple[MechanismSpec, ...], str], float] = {}
        self._chains: dict[LedgerRef, Chain] = {}

    def _new_pool(self) -> ProcessPoolExecutor:
        # Spawned, not forked: a fork would copy locks that other threads hold.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self._processes, mp_context=context, initializer=_end_with_parent)

    @property
    def process_ids(self) -> list[int]:
        """Of the processes that compute now."""
        return sorted(self._pool._processes or ())

    async def _compute(self, call: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        pool = self._pool
        try:
            return await asyncio.wrap_future(pool.submit(call, *args, **kwargs))
        except BrokenProcessPool as error:
            if self._pool is pool:
                self._pool = self._new_pool()
            raise AccountantDied(
                "the accountant's process was killed: give the operator more memory"
            ) from error

    def sigma_if_solved(self, training: Training, wake: Callable[[], None]) -> float | None:
        """The noise multiplier, or None while it is being solved for: that takes seconds, then calls `wake`.

        Raises:
            ValueError: no noise gives that ε; the text says what to change.
        """
        task = self._sigmas.get(training)
        if task is None or (task.done() and isinstance(task.exception(), AccountantDied)):
            task = self._sigmas[training] = asyncio.create_task(self._compute(_sigma, training))
        if task.done():
            return task.result()
        task.add_done_callback(lambda _: wake())
        return None

    async def account(self, client: FederatedClient) -> Account:
        """The client's ledger as it is now.

        Raises:
            LedgerBroken: it is shorter than it was, or altered.
            StoreError: it cannot be read.
        """
        ref = LedgerRef.of(client)
        chain = await self.chain(ref)
        _check_mirror(client.status.privacy, chain, ref)
        delta = client.spec.privacy.budget.delta
        charged = await self.epsilon(chain.charged(), delta)
        return Account(chain, charged, await self.epsilon(chain.launched(), delta))

    async def chain(self, ref: LedgerRef) -> Chain:
        """The ledger as it is now, verified. Raises LedgerBroken or a StoreError."""
        metrics.STORE_REQUESTS.labels("ledger").inc()
        chain = await self._records.in_thread(self._ledger(ref).read, self._chains.get(ref, EMPTY))
        return self._remember(ref, chain)

    def _remember(self, ref: LedgerRef, chain: Chain) -> Chain:
        # Two passes may read at the same time; the longer one is the later one.
        if len(chain.entries) >= len(self._chains.get(ref, EMPTY).entries):
            self._chains[ref] = chain
        return chain

    def _ledger(self, ref: LedgerRef) -> Ledger:
        return Ledger(self.store, ref.uri, ref.data_set, _clock)

    async def epsilon(self, mechanisms: list[MechanismSpec], delta: str) -> float:
        """ε of all of them on one data set."""
        key = (tuple(sorted(mechanisms, key=repr)), delta)
        if mechanisms and key not in self._epsilons:
            self._epsilons[key] = await self._compute(accountant.epsilon, list(key[0]), float(delta))
        return self._epsilons.get(key, 0.0)

    async def runs_within(
        self, client: FederatedClient, asked: MechanismSpec, *, besides: str, at_most: int
    ) -> int:
        """How many runs of this mechanism the client's budget holds; run `besides` is one of them.

        Raises LedgerBroken or a StoreError.
        """
        ref, budget = LedgerRef.of(client), client.spec.privacy.budget
        charged = (await self.chain(ref)).charged(besides)
        limit, delta = float(budget.epsilon), float(budget.delta)
        return await self._compute(accountant.runs_within, limit, delta, charged, asked, at_most)

    async def reserve(
        self, ref: LedgerRef, grant: Grant, budget: PrivacyBudget, mirror: ClientPrivacyStatus
    ) -> Chain:
        """Append to a chain that still is what the client's status, `mirror`, says of it.

        Raises BudgetExceeded, LedgerRefused, LedgerBroken or a StoreError.
        """
        known = await self.chain(ref)
        _check_mirror(mirror, known, ref)
        try:
            chain = await self._compute(_reserve, self._endpoint, ref, grant, budget, known)
        except BudgetExceeded:
            metrics.EPSILON_REFUSALS.inc()
            raise
        return self._remember(ref, chain)

    async def close_run(self, kind: LedgerKind, ref: LedgerRef, grant: Grant, reason: str) -> Chain:
        """Settle or release: nothing is composed. Raises LedgerRefused, LedgerBroken or a StoreError."""
        ledger, known = self._ledger(ref), self._chains.get(ref, EMPTY)
        if kind is LedgerKind.SETTLE:
            chain = await self._records.in_thread(ledger.settle, grant, known)
        elif kind is LedgerKind.RELEASE:
            chain = await self._records.in_thread(ledger.release, grant, reason, known)
        else:
            raise ValueError(f"the operator does not write {kind} entries")
        return self._remember(ref, chain)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


__all__ = [
    "Account",
    "AccountantDied",
    "Accounting",
    "BudgetExceeded",
    "LedgerBroken",
    "LedgerRef",
    "Training",
]

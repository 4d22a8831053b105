"""Defective ledgers and accountants."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from memory_store import MemoryStore
from privacy_proofs.ledger_checks import DATA_SET, ledger_on
from training_worlds import NOW

from tributary_accounting import accountant
from tributary_accounting.ledger import Chain, Ledger, LedgerStore
from tributary_api.records import MechanismSpec
from tributary_store.errors import StoreUnreachable


class EntryLost(Ledger):
    """A worker whose launch could not be written starts all the same."""

    def launch(self, *arguments: Any, **more: Any) -> Chain:
        try:
            return super().launch(*arguments, **more)
        except StoreUnreachable:
            return self.read()


def entry_lost(store: LedgerStore) -> Ledger:
    return EntryLost(store, "s3://own/ledger/", DATA_SET, lambda: NOW)


class Overwriting:
    """A store without conditional writes: the last one to write an entry owns its number."""

    def __init__(self, store: MemoryStore) -> None:
        self._store = store

    def get(self, uri: str) -> bytes:
        return self._store.get(uri)

    def put_new(self, uri: str, data: bytes, *, retain: bool = False) -> bool:
        try:
            return self._store.put_new(uri, data, retain=retain)
        except Exception:
            self._store.objects[uri] = data
            return True


def entry_overwritten(store: Any) -> Ledger:
    return ledger_on(Overwriting(store))


def added_up(mechanisms: Sequence[MechanismSpec], delta: float) -> float:
    return sum(accountant.epsilon([mechanism], delta) for mechanism in mechanisms)


def largest(mechanisms: Sequence[MechanismSpec], delta: float) -> float:
    """As if every training had its own budget."""
    return max(accountant.epsilon([mechanism], delta) for mechanism in mechanisms)


def classical(mechanisms: Sequence[MechanismSpec], delta: float) -> float:
    """sqrt(2 ln(1.25/delta)) / sigma for one step, with advanced composition: proven for epsilon < 1 only."""
    total = 0.0
    for mechanism in mechanisms:
        step = (
            mechanism.sampling_probability
            * math.sqrt(2 * math.log(1.25 / delta))
            / mechanism.noise_multiplier
        )
        total += mechanism.steps * step**2
    return math.sqrt(2 * total * math.log(1 / delta))


def sigma_without_composition(n: int, batch: int, steps: int, epsilon: float, delta: float) -> float:
    """Solved for one step."""
    return accountant.noise_multiplier(n, batch, 1, epsilon, delta)

"""What ledger and accountant must do, as functions of how they are made: 4.6 and 4.9 of the specification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import training_worlds as worlds
from memory_store import MemoryStore
from signers import OWNER_KEY

from tributary_accounting import accountant
from tributary_accounting.ledger import BudgetExceeded, Ledger, LedgerRefused, LedgerStore
from tributary_accounting.mechanism import dp_sgd
from tributary_api.client import PrivacyBudget
from tributary_api.meta import NamespacedName
from tributary_api.records import Grant, LedgerKind, MechanismSpec
from tributary_store.errors import StoreUnreachable

MakeLedger = Callable[[LedgerStore], Ledger]
Epsilon = Callable[[Sequence[MechanismSpec], float], float]
NoiseMultiplier = Callable[[int, int, int, float, float], float]

DATA_SET = NamespacedName(namespace="clinic-a", name="notes")
PLENTY = PrivacyBudget(epsilon="100", delta="1e-3")
STORY = [
    "reserve a",
    "launch a",
    "release a",
    "settle a",
    "reserve b",
    "release b",
    "launch b",
    "reserve c",
    "launch c",
    "settle c",
    "release c",
]
"""Releases come where a hub might wrongly ask for them, or has lost track of a worker."""
WRITES = 8
"""More than the story has."""

NUM_EXAMPLES, BATCH, DELTA = 10_000, 256, 1e-5
SIGMAS = {
    (40, 1.0): 1.1225,
    (40, 3.0): 0.7468,
    (40, 8.0): 0.5147,
    (200, 1.0): 1.6278,
    (200, 3.0): 0.9052,
    (200, 8.0): 0.6212,
    (800, 1.0): 2.8475,
    (800, 3.0): 1.2630,
    (800, 8.0): 0.7781,
}
"""(steps, epsilon) -> sigma, computed with dp-accounting's default discretization, untruncated Poisson
sampling and the add/remove relation."""


def ledger_on(store: LedgerStore) -> Ledger:
    return Ledger(store, "s3://own/ledger/", DATA_SET, lambda: worlds.NOW)


def grant_of(run: str) -> Grant:
    return worlds.train_task(worlds.NOWHERE, worlds.client_object()).grant.model_copy(update={"run_key": run})


@dataclass
class DyingStore(MemoryStore):
    """The process that makes one certain write dies: before it, or after it and before it knows."""

    fatal: int = -1
    is_written: bool = False
    writes: int = field(default=0)

    def put_new(self, uri: str, data: bytes, *, retain: bool = False) -> bool:
        self.writes += 1
        if self.writes - 1 != self.fatal:
            return super().put_new(uri, data, retain=retain)
        if self.is_written:
            super().put_new(uri, data, retain=retain)
        raise StoreUnreachable(uri)


def check_killed_at_every_write(make: MakeLedger) -> None:
    """4.9: whoever dies at whichever write, every run that a worker was let start is charged."""
    for fatal in range(WRITES):
        for is_written in (False, True):
            store = DyingStore(fatal=fatal, is_written=is_written)
            started = _play(make, store)
            chain = ledger_on(store).read()
            charged = {e.run_key for e in chain.entries if chain.state(e.run_key) is not LedgerKind.RELEASE}
            assert started <= charged, f"killed at write {fatal}: {started - charged} ran and is not charged"
            assert len(chain.charged()) == len(charged), "a run is charged twice or not at all"


def _play(make: MakeLedger, store: LedgerStore) -> set[str]:
    """The story, each step by a process of its own; gives the runs that a worker was let start."""
    started = set()
    for kind, run in map(str.split, STORY):
        ledger, grant = make(store), grant_of(run)
        try:
            if kind == "launch":
                ledger.launch(grant, OWNER_KEY.public)
                started.add(run)
            elif kind == "reserve":
                ledger.reserve(grant, PLENTY)
            elif kind == "release":
                ledger.release(grant, "the round was given up")
            else:
                ledger.settle(grant)
        except (StoreUnreachable, LedgerRefused):
            continue
    return started


@dataclass
class BusyStore(MemoryStore):
    """Somebody else writes between a writer's reading and its writing."""

    meanwhile: Callable[[], None] | None = None

    def put_new(self, uri: str, data: bytes, *, retain: bool = False) -> bool:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile is not None:
            meanwhile()
        return super().put_new(uri, data, retain=retain)


def check_reservers_in_a_race(make: MakeLedger) -> None:
    """4.9: of two reservers for whom the budget holds one, one is told that it holds no more."""
    one = accountant.epsilon([grant_of("a").mechanism], 1e-3)
    budget, granted = PrivacyBudget(epsilon=f"{1.1 * one:.4f}", delta="1e-3"), []

    def reserve(run: str) -> None:
        make(store).reserve(grant_of(run), budget)
        granted.append(run)

    store = BusyStore(meanwhile=lambda: reserve("b"))
    try:
        reserve("a")
    except BudgetExceeded:
        granted.append("(refused)")
    charged = {entry.run_key for entry in ledger_on(store).read().entries}
    assert granted == ["b", "(refused)"], f"{granted} were told that the budget holds them"
    assert charged == {"b"}, f"{charged} are charged"


def check_composition(epsilon: Epsilon) -> None:
    """4.6: reference values, composition that is neither forgotten nor a sum, and monotony."""
    mechanism = dp_sgd(NUM_EXAMPLES, BATCH, 800, SIGMAS[800, 3.0], 1.0)
    one, two = epsilon([mechanism], DELTA), epsilon([mechanism, mechanism], DELTA)
    assert one == pytest.approx(3.0, abs=0.01), f"{one:.3f} where 3.00 is due"
    assert two == pytest.approx(4.354, abs=0.01), f"two runs cost {two:.3f} where 4.354 is due"
    shorter = mechanism.model_copy(update={"steps": 40})
    louder = shorter.model_copy(update={"noise_multiplier": 2.0})
    assert epsilon([louder], DELTA) < epsilon([shorter], DELTA) < one < epsilon([mechanism, shorter], DELTA)
    assert epsilon([shorter], DELTA) < epsilon([shorter], DELTA / 100)
    assert one <= accountant.rdp_epsilon(mechanism, DELTA) <= 1.4 * one


def check_reference_sigmas(noise_multiplier: NoiseMultiplier) -> None:
    """4.6: the table of the specification, to 1e-3."""
    for (steps, epsilon), due in SIGMAS.items():
        found = noise_multiplier(NUM_EXAMPLES, BATCH, steps, epsilon, DELTA)
        assert abs(found - due) <= 1e-3, (
            f"sigma {found:.4f} for epsilon {epsilon} and {steps} steps, not {due}"
        )

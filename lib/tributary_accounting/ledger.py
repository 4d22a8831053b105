"""The privacy ledger of a data set: append-only, hash-chained, shared by all rounds and hubs.

Entries of one run go reserve → launch → settle, or reserve → release when nothing was ever launched.
The hub reserves and settles; the worker itself launches, before its first step on the data. Entry n is
created with `If-None-Match: *`, so two writers can never both own a number: the loser reads again and
decides again. That is what makes "release only without a launch" and "reserve only within the budget" hold
between processes that know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from pydantic import ValidationError

from tributary_accounting import accountant
from tributary_api.client import PrivacyBudget
from tributary_api.meta import NamespacedName
from tributary_api.records import Grant, LedgerEntry, LedgerKind, MechanismSpec
from tributary_store.errors import ObjectExists, ObjectMissing
from tributary_store.keys import ledger_entry

APPEND_ATTEMPTS_MAX = 200
"""Lost races before giving up. Each lost race is another writer's entry, so 50 writers need at most 50."""

ORDER = (LedgerKind.RESERVE, LedgerKind.LAUNCH, LedgerKind.SETTLE)
FOLLOWING: Mapping[LedgerKind, frozenset[LedgerKind]] = {
    LedgerKind.RESERVE: frozenset({LedgerKind.LAUNCH, LedgerKind.SETTLE, LedgerKind.RELEASE}),
    LedgerKind.LAUNCH: frozenset({LedgerKind.SETTLE}),
    LedgerKind.SETTLE: frozenset(),
    LedgerKind.RELEASE: frozenset(),
}
"""What may come next in a run. It begins with a reservation."""


class LedgerStore(Protocol):
    """What the ledger needs of an object store."""

    def get(self, uri: str) -> bytes: ...

    def put_new(self, uri: str, data: bytes, *, retain: bool = False) -> bool: ...


class LedgerBroken(Exception):
    """The chain is shorter than it was, or an entry does not follow from those before."""


class LedgerRefused(Exception):
    """The entry would break the ledger's order, for example a launch without a reservation."""


class BudgetExceeded(Exception):
    """The reservation would take the data set above its budget."""


@dataclass(frozen=True, slots=True)
class Chain:
    """The entries of a ledger, verified from the first to the last."""

    entries: tuple[LedgerEntry, ...] = ()

    @property
    def head(self) -> str:
        """Digest of the last entry; empty for an empty ledger."""
        return self.entries[-1].digest if self.entries else ""

    def state(self, run_key: str) -> LedgerKind | None:
        """How far the run has come on this data set."""
        kinds = [entry.kind for entry in self.entries if entry.run_key == run_key]
        return kinds[-1] if kinds else None

    def has_reserved(self, grant: Grant) -> bool:
        """Whether the grant's run was reserved with this very grant, and for what it costs."""
        first = next((entry for entry in self.entries if entry.run_key == grant.run_key), None)
        due = (grant.digest, grant.mechanism, grant.delta)
        return first is not None and (first.grant_digest, first.mechanism, first.delta) == due

    def receipt_key(self, run_key: str) -> str | None:
        """The key that the run's worker signs with, once it has launched."""
        keys = (e.receipt_key for e in self.entries if e.run_key == run_key and e.kind is LedgerKind.LAUNCH)
        return next(keys, None)

    def charged(self, besides: str = "") -> list[MechanismSpec]:
        """Every mechanism that was reserved and not released: assumed to be spent. `besides`: a run that does
        not count."""
        reserved = (e for e in self.entries if e.kind is LedgerKind.RESERVE and e.run_key != besides)
        return [e.mechanism for e in reserved if not self._released(e)]

    def launched(self) -> list[MechanismSpec]:
        """Those of them that a worker has started."""
        started = {e.run_key for e in self.entries if e.kind is LedgerKind.LAUNCH}
        return [e.mechanism for e in self.entries if e.kind is LedgerKind.RESERVE and e.run_key in started]

    def _released(self, reservation: LedgerEntry) -> bool:
        return self.state(reservation.run_key) is LedgerKind.RELEASE


EMPTY = Chain()


def read(store: LedgerStore, ledger_uri: str, data_set: NamespacedName, known: Chain = EMPTY) -> Chain:
    """The ledger as it is now, verified. `known` is a chain read earlier: only what follows is fetched.

    Raises:
        LedgerBroken: an entry does not chain, breaks the order of its run, is about another data set, or is
            not readable as an entry.
    """
    entries = list(known.entries)
    if entries:
        _check_still_there(store, ledger_uri, entries[-1])
    while True:
        try:
            data = store.get(ledger_entry(ledger_uri, len(entries)))
        except ObjectMissing:
            return Chain(tuple(entries))
        entries.append(_verified(data, ledger_uri, data_set, entries))


def _check_still_there(store: LedgerStore, ledger_uri: str, last: LedgerEntry) -> None:
    uri = ledger_entry(ledger_uri, last.n)
    try:
        unchanged = store.get(uri) == last.canonical_json()
    except ObjectMissing:
        unchanged = False
    if not unchanged:
        raise LedgerBroken(
            f"{uri} was there and is gone or changed: restore the ledger before any other training"
        )


def _verified(
    data: bytes, ledger_uri: str, data_set: NamespacedName, before: list[LedgerEntry]
) -> LedgerEntry:
    uri = ledger_entry(ledger_uri, len(before))
    try:
        entry = LedgerEntry.model_validate_json(data)
    except ValidationError as error:
        raise LedgerBroken(
            f"{uri} is not a ledger entry ({error.error_count()} errors): restore it"
        ) from error
    previous = before[-1].digest if before else ""
    if entry.n != len(before) or entry.previous != previous or entry.canonical_json() != data:
        raise LedgerBroken(
            f"{uri} does not follow from the entry before it: the ledger was altered, restore it"
        )
    if entry.data_set != data_set:
        raise LedgerBroken(
            f"{uri} is about data set {entry.data_set}, not {data_set}: use one ledgerUri per data set"
        )
    if not _is_in_order(entry, [e for e in before if e.run_key == entry.run_key]):
        raise LedgerBroken(
            f"{uri}: a {entry.kind} cannot follow what the ledger holds of run {entry.run_key}, or says "
            "something else of it: whoever wrote it does not keep the rules, find out who"
        )
    return entry


def _is_in_order(entry: LedgerEntry, run: list[LedgerEntry]) -> bool:
    """Every reader checks what honest writers keep: else a release after a launch would refill a budget."""
    if not run:
        return entry.kind is LedgerKind.RESERVE
    reserved = run[0]
    said = (entry.client, entry.grant_digest, entry.mechanism, entry.delta)
    is_same = said == (reserved.client, reserved.grant_digest, reserved.mechanism, reserved.delta)
    return is_same and entry.kind in FOLLOWING[run[-1].kind]


@dataclass(frozen=True, slots=True)
class Ledger:
    """The ledger of one data set in one store. Every method is safe to repeat: an entry counts once.
    A settled run cannot be launched again."""

    store: LedgerStore
    uri: str
    data_set: NamespacedName
    clock: Callable[[], datetime]

    def read(self, known: Chain = EMPTY) -> Chain:
        return read(self.store, self.uri, self.data_set, known)

    def reserve(self, grant: Grant, budget: PrivacyBudget, known: Chain = EMPTY) -> Chain:
        """Set the grant's cost aside before a worker starts. Takes seconds: it composes the whole ledger.

        Raises:
            BudgetExceeded: the data set's budget does not hold it.
            LedgerRefused: the run was reserved with another grant, or has been released.
        """

        def check(chain: Chain) -> None:
            epsilon = accountant.epsilon([*chain.charged(), grant.mechanism], float(budget.delta))
            if epsilon > float(budget.epsilon):
                spent = accountant.epsilon(chain.charged(), float(budget.delta))
                raise BudgetExceeded(
                    f"epsilon would be {epsilon:.2f} of {budget.epsilon} (now {spent:.2f}): "
                    "ask for a smaller epsilon, or the owner raises privacy.budget"
                )

        return self._append(LedgerKind.RESERVE, grant, check, known)

    def launch(self, grant: Grant, receipt_key: str, known: Chain = EMPTY) -> Chain:
        """The worker starts: from now on the cost counts as spent, whatever happens to the worker.

        Raises:
            LedgerRefused: there is no reservation with this very grant, it was released or settled, or an
                earlier attempt had another key, and so other noise.
        """
        chain = self._append(LedgerKind.LAUNCH, grant, _nothing, known, receipt_key=receipt_key)
        first = chain.receipt_key(grant.run_key)
        if first != receipt_key:
            raise LedgerRefused(
                f"run {grant.run_key} was launched with the key {first}, and this worker has {receipt_key}: "
                "restore the Secret of the noise key, for another one would make a second delta"
            )
        return chain

    def settle(self, grant: Grant, known: Chain = EMPTY) -> Chain:
        """The delta was delivered."""
        return self._append(LedgerKind.SETTLE, grant, _nothing, known)

    def release(self, grant: Grant, reason: str, known: Chain = EMPTY) -> Chain:
        """Give back what provably never ran. A run that was launched stays charged: nothing changes."""
        chain = self.read(known)
        if chain.state(grant.run_key) is not LedgerKind.RESERVE:
            return chain
        try:
            return self._append(LedgerKind.RELEASE, grant, _nothing, chain, reason=reason)
        except LedgerRefused:  # the worker launched in between
            return self.read(chain)

    def _append(
        self, kind: LedgerKind, grant: Grant, check: Callable[[Chain], None], known: Chain, **facts: str
    ) -> Chain:
        chain = known
        for _ in range(APPEND_ATTEMPTS_MAX):
            chain = self.read(chain)
            if not _is_due(kind, chain, grant):
                return chain
            check(chain)
            entry = self._entry(kind, chain, grant, facts)
            try:
                self.store.put_new(ledger_entry(self.uri, entry.n), entry.canonical_json(), retain=True)
            except ObjectExists:
                continue
            return Chain((*chain.entries, entry))
        raise LedgerRefused(f"{self.uri} is written by too many at once: try again later")

    def _entry(self, kind: LedgerKind, chain: Chain, grant: Grant, facts: Mapping[str, str]) -> LedgerEntry:
        return LedgerEntry(
            n=len(chain.entries),
            previous=chain.head,
            kind=kind,
            data_set=self.data_set,
            client=grant.client,
            run_key=grant.run_key,
            grant_digest=grant.digest,
            hub_namespace=grant.hub_namespace,
            mechanism=grant.mechanism,
            delta=grant.delta,
            recorded_at=self.clock(),
            reason=facts.get("reason", ""),
            receipt_key=facts.get("receipt_key"),
        )


def _nothing(_: Chain) -> None:
    """No further condition."""


def _is_due(kind: LedgerKind, chain: Chain, grant: Grant) -> bool:
    """False if the entry, or a later one of its run, is there already.

    Raises:
        LedgerRefused: the entry must not follow what is there.
    """
    state = chain.state(grant.run_key)
    if state is not None and not chain.has_reserved(grant):
        raise LedgerRefused(f"run {grant.run_key} was reserved with another grant: only that one may be used")
    if kind is LedgerKind.RELEASE:
        if state is not LedgerKind.RESERVE:
            raise LedgerRefused(f"run {grant.run_key} cannot be released: its state is {state or 'unknown'}")
        return True
    if state is LedgerKind.RELEASE:
        raise LedgerRefused(
            f"run {grant.run_key} was released: it may not start any more, create another round"
        )
    if (kind, state) == (LedgerKind.LAUNCH, LedgerKind.SETTLE):
        raise LedgerRefused(
            f"run {grant.run_key} was settled: its delta is delivered and what it paid for is used up"
        )
    reached = ORDER.index(state) if state else -1
    step = ORDER.index(kind)
    if reached >= step:
        return False
    if step > 0 and reached < 0:
        raise LedgerRefused(f"run {grant.run_key} has no reservation in {chain.head or 'the empty ledger'}")
    return True

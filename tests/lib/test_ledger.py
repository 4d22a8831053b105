"""The ledger under races, lost answers and tampering: it may overstate what was spent, never understate."""

import threading
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from signers import HUB_KEY, OWNER_KEY

from tributary_accounting import accountant
from tributary_accounting.ledger import BudgetExceeded, Ledger, LedgerBroken, LedgerRefused, read
from tributary_accounting.mechanism import dp_sgd
from tributary_api.client import PrivacyBudget
from tributary_api.meta import NamespacedName
from tributary_api.records import Grant, LedgerKind
from tributary_store.errors import ObjectExists, ObjectMissing, StoreUnreachable
from tributary_store.keys import ledger_entry

URI = "s3://owner/ledger/notes/"
DATA_SET = NamespacedName(namespace="clinic-a", name="notes")
DELTA = 1e-5
MECHANISM = dp_sgd(10_000, 256, 40, 0.7471, 0.5)  # ε = 3 at δ = 1e-5
KEY = OWNER_KEY.public
PLENTY = PrivacyBudget(epsilon="100", delta="1e-5")


class Objects:
    """Create-only objects in memory; `fault` may lose a write before it happens or its answer after."""

    def __init__(self):
        self.objects, self.lock, self.fault = {}, threading.Lock(), lambda: None

    def get(self, uri):
        with self.lock:
            if uri not in self.objects:
                raise ObjectMissing(uri)
            return self.objects[uri]

    def put_new(self, uri, data, *, retain=False):
        fault = self.fault()
        if fault == "before":
            raise StoreUnreachable(uri)
        with self.lock:
            there = self.objects.setdefault(uri, data)
        if fault == "after":
            raise StoreUnreachable(uri)
        if there != data:
            raise ObjectExists(uri)
        return True


def a_ledger(store=None):
    return Ledger(store or Objects(), URI, DATA_SET, lambda: datetime(2026, 1, 1, tzinfo=UTC))


def a_grant(run_key="run-1", mechanism=MECHANISM, computation="sha256:" + "1" * 64):
    return Grant(
        run_key=run_key,
        hub_namespace="hub",
        round_name=run_key,
        client=NamespacedName(namespace="clinic-a", name="notes"),
        data_name="notes",
        base_model_digest="sha256:" + "0" * 64,
        mechanism=mechanism,
        epsilon="3",
        delta="1e-5",
        delta_uri=f"s3://exchange/{run_key}/delta.safetensors",
        computation=computation,
    )


def test_a_run_goes_from_reserved_to_settled_and_each_step_counts_once():
    ledger, grant = a_ledger(), a_grant()
    for step in (
        lambda: ledger.reserve(grant, PLENTY),
        lambda: ledger.launch(grant, KEY),
        lambda: ledger.settle(grant),
    ):
        assert step() == step()
    chain = ledger.read()
    assert [entry.kind for entry in chain.entries] == ["reserve", "launch", "settle"]
    assert chain.charged() == chain.launched() == [MECHANISM]


def test_a_reservation_above_the_budget_is_refused_and_nothing_is_written():
    ledger = a_ledger()
    ledger.reserve(a_grant("run-1"), PrivacyBudget(epsilon="3.5", delta="1e-5"))
    with pytest.raises(BudgetExceeded, match=r"3\.60 of 3\.5 \(now 3\.00\)"):
        ledger.reserve(a_grant("run-2"), PrivacyBudget(epsilon="3.5", delta="1e-5"))
    assert len(ledger.read().entries) == 1


def test_release_gives_back_only_what_never_ran():
    ledger = a_ledger()
    ledger.reserve(a_grant("never"), PLENTY)
    ledger.reserve(a_grant("ran"), PLENTY)
    ledger.launch(a_grant("ran"), KEY)
    ledger.release(a_grant("never"), "round failed")
    assert ledger.release(a_grant("ran"), "round failed").state("ran") is LedgerKind.LAUNCH
    assert ledger.read().charged() == [MECHANISM]
    with pytest.raises(LedgerRefused, match="released"):
        ledger.launch(a_grant("never"), KEY)


def test_launch_needs_the_very_grant_that_was_reserved():
    ledger = a_ledger()
    with pytest.raises(LedgerRefused, match="no reservation"):
        ledger.launch(a_grant(), KEY)
    ledger.reserve(a_grant(), PLENTY)
    with pytest.raises(LedgerRefused, match="another grant"):
        ledger.launch(a_grant(mechanism=dp_sgd(10_000, 256, 40, 0.1, 0.5)), KEY)
    with pytest.raises(LedgerRefused, match="another grant"):
        ledger.launch(a_grant(computation="sha256:" + "2" * 64), KEY)


def test_a_settled_run_is_never_launched_again():
    ledger = a_ledger()
    ledger.reserve(a_grant(), PLENTY)
    ledger.launch(a_grant(), KEY)
    settled = ledger.settle(a_grant())
    with pytest.raises(LedgerRefused, match="used up"):
        ledger.launch(a_grant(), KEY)
    assert ledger.read() == settled


def test_a_retry_with_another_key_would_make_a_second_delta_and_is_refused():
    ledger = a_ledger()
    ledger.reserve(a_grant(), PLENTY)
    first = ledger.launch(a_grant(), KEY)
    assert ledger.launch(a_grant(), KEY) == first
    assert first.receipt_key("run-1") == KEY
    with pytest.raises(LedgerRefused, match="restore the Secret"):
        ledger.launch(a_grant(), HUB_KEY.public)
    assert ledger.read() == first


def test_a_chain_that_became_shorter_is_refused():
    store = Objects()
    ledger = a_ledger(store)
    known = ledger.reserve(a_grant(), PLENTY)
    del store.objects[ledger_entry(URI, 0)]
    with pytest.raises(LedgerBroken, match="is gone or changed"):
        ledger.read(known)


@given(position=st.integers(0, 2), byte=st.integers(0, 10_000), value=st.integers(1, 255))
def test_any_changed_byte_is_found(position, byte, value):
    store = Objects()
    ledger = a_ledger(store)
    ledger.reserve(a_grant(), PLENTY)
    ledger.launch(a_grant(), KEY)
    ledger.reserve(a_grant("run-2"), PLENTY)
    known = ledger.settle(a_grant())
    uri = ledger_entry(URI, position)
    data = bytearray(store.objects[uri])
    data[byte % len(data)] ^= value
    store.objects[uri] = bytes(data)
    with pytest.raises(LedgerBroken):
        read(store, URI, DATA_SET)
    assert known.charged() == [MECHANISM, MECHANISM]


def test_a_ledger_of_another_data_set_is_refused():
    store = Objects()
    a_ledger(store).reserve(a_grant(), PLENTY)
    with pytest.raises(LedgerBroken, match="one ledgerUri per data set"):
        read(store, URI, NamespacedName(namespace="clinic-a", name="letters"))


def forged(store, **changes):
    """The last entry again, with changes, chained as it should be: a writer that does not keep the rules."""
    entries = read(store, URI, DATA_SET).entries
    last = entries[-1]
    entry = last.model_copy(update={"n": last.n + 1, "previous": last.digest} | changes)
    store.put_new(ledger_entry(URI, entry.n), entry.canonical_json())


CHEAPER = MECHANISM.model_copy(update={"noise_multiplier": 64.0})
UNLAWFUL = [
    ("reserve", {"kind": LedgerKind.RESERVE}),
    ("reserve", {"kind": LedgerKind.LAUNCH, "mechanism": CHEAPER}),
    ("reserve", {"kind": LedgerKind.LAUNCH, "delta": "1e-9"}),
    ("reserve", {"kind": LedgerKind.LAUNCH, "grant_digest": "sha256:" + "f" * 64}),
    ("reserve", {"kind": LedgerKind.LAUNCH, "run_key": "run-2"}),
    ("launch", {"kind": LedgerKind.RELEASE}),
    ("launch", {"kind": LedgerKind.LAUNCH}),
    ("settle", {"kind": LedgerKind.RELEASE}),
    ("settle", {"kind": LedgerKind.RESERVE}),
    ("release", {"kind": LedgerKind.LAUNCH}),
]


@pytest.mark.parametrize(("state", "changes"), UNLAWFUL)
def test_an_entry_that_no_honest_writer_makes_is_found_by_every_reader(state, changes):
    """A release after a launch would refill the budget, a cheaper launch would understate it."""
    store, grant = Objects(), a_grant()
    ledger = a_ledger(store)
    ledger.reserve(grant, PLENTY)
    if state in ("launch", "settle"):
        ledger.launch(grant, KEY)
    if state == "settle":
        ledger.settle(grant)
    if state == "release":
        ledger.release(grant, "never started")
    forged(store, **changes)
    with pytest.raises(LedgerBroken, match="does not keep the rules"):
        read(store, URI, DATA_SET)


def test_a_reservation_that_understates_the_cost_pays_for_nothing():
    """The hub writes reservations: one with the grant's digest and another mechanism starts no worker."""
    store, grant = Objects(), a_grant()
    a_ledger(store).reserve(grant, PLENTY)
    uri = ledger_entry(URI, 0)
    cheap = read(store, URI, DATA_SET).entries[0].model_copy(update={"mechanism": CHEAPER})
    store.objects[uri] = cheap.canonical_json()
    assert not read(store, URI, DATA_SET).has_reserved(grant)
    with pytest.raises(LedgerRefused, match="another grant"):
        a_ledger(store).launch(grant, KEY)


RESERVERS = 50
BUDGET = PrivacyBudget(epsilon="8", delta="1e-5")


class Killed(BaseException):
    """The process is gone: no `except` of the ledger's may see it."""


class DyingStore:
    """The store of a process that is killed at its `dies_at`-th write, just before it or just after."""

    def __init__(self, store, dies_at=None, *, is_written=False):
        self.store, self.dies_at, self.is_written, self.writes = store, dies_at, is_written, 0

    def get(self, uri):
        return self.store.get(uri)

    def put_new(self, uri, data, *, retain=False):
        is_last, self.writes = self.writes == self.dies_at, self.writes + 1
        if is_last and not self.is_written:
            raise Killed
        done = self.store.put_new(uri, data, retain=retain)
        if is_last:
            raise Killed
        return done


def ledger_in(store, prefix):
    return Ledger(store, f"{prefix}/ledger/", DATA_SET, lambda: datetime(2026, 1, 1, tzinfo=UTC))


def test_fifty_concurrent_reservers_never_overspend(objects):
    """Half of them are killed at their first write, before it or after, and started again."""
    store, prefix = objects
    granted, start = [], threading.Barrier(RESERVERS)

    def reserve(i):
        start.wait()
        deaths = [DyingStore(store, 0, is_written=i % 4 == 0)] if i % 2 == 0 else []
        for mine in [*deaths, store]:
            try:
                ledger_in(mine, prefix).reserve(a_grant(f"run-{i}"), BUDGET)
                granted.append(i)
            except (Killed, BudgetExceeded):
                continue

    threads = [threading.Thread(target=reserve, args=(i,)) for i in range(RESERVERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    chain = ledger_in(store, prefix).read()
    assert [entry.n for entry in chain.entries] == list(range(len(chain.entries)))
    assert len({entry.run_key for entry in chain.entries}) == len(chain.entries), "a run was charged twice"
    assert {f"run-{i}" for i in granted} <= {entry.run_key for entry in chain.entries}
    assert len(chain.charged()) > 1
    assert accountant.epsilon(chain.charged(), DELTA) <= 8.0
    assert accountant.epsilon([*chain.charged(), MECHANISM], DELTA) > 8.0, "room was left unused"


def story(ledger, started):
    """What operator and worker do with two rounds, one of which ends without this client."""
    ledger.reserve(a_grant("trains"), BUDGET)
    ledger.reserve(a_grant("ends"), BUDGET)
    ledger.launch(a_grant("trains"), KEY)
    started.add("trains")
    ledger.settle(a_grant("trains"))
    ledger.release(a_grant("ends"), "the round ended without this client")


WRITES_OF_THE_STORY = 5


@pytest.mark.parametrize("is_written", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("dies_at", range(WRITES_OF_THE_STORY))
def test_killed_at_every_write_nothing_is_charged_twice_or_forgotten(objects, dies_at, is_written):
    store, prefix = objects
    started = set()
    with pytest.raises(Killed):
        story(ledger_in(DyingStore(store, dies_at, is_written=is_written), prefix), started)
    found = ledger_in(store, prefix).read()
    assert len(found.entries) == dies_at + is_written
    assert all(found.state(run) is not None for run in started), "a worker runs that the ledger does not know"
    with_story = ledger_in(DyingStore(store), prefix)
    story_again(with_story, started)
    chain = with_story.read()
    assert [e.kind for e in chain.entries] == ["reserve", "reserve", "launch", "settle", "release"]
    assert chain.charged() == chain.launched() == [MECHANISM]


def story_again(ledger, started):
    """From the start, as after any restart; what is settled already launches nothing more."""
    ledger.reserve(a_grant("trains"), BUDGET)
    if ledger.read().state("ends") is not LedgerKind.RELEASE:
        ledger.reserve(a_grant("ends"), BUDGET)
    if ledger.read().state("trains") is not LedgerKind.SETTLE:
        ledger.launch(a_grant("trains"), KEY)
        started.add("trains")
    ledger.settle(a_grant("trains"))
    ledger.release(a_grant("ends"), "the round ended without this client")


STEPS = ["reserve", "launch", "settle", "release"]
faults = st.lists(st.sampled_from([None, None, "before", "after"]), min_size=40, max_size=40)


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.sampled_from(["run-1", "run-2"])), max_size=12), faults)
@settings(max_examples=200, deadline=None)
def test_recorded_is_never_below_true_when_any_write_dies(steps, fault_list):
    """True cost: every run whose launch was acknowledged; a worker may start only then."""
    store, running = Objects(), set()
    pending = iter(fault_list)
    store.fault = lambda: next(pending, None)
    ledger = a_ledger(store)
    for step, run in steps:
        grant = a_grant(run)
        try:
            if step == "reserve":
                ledger.reserve(grant, PLENTY)
            elif step == "release":
                ledger.release(grant, "test")
            elif step == "launch":
                ledger.launch(grant, KEY)
                running.add(run)
            else:
                ledger.settle(grant)
        except (StoreUnreachable, LedgerRefused):
            continue
    chain = ledger.read()
    charged = {entry.run_key for entry in chain.entries} - {
        entry.run_key for entry in chain.entries if entry.kind is LedgerKind.RELEASE
    }
    assert running <= charged
    assert len(chain.charged()) == len(charged)

"""Computing in other processes: remembered, woken for, survived when they are killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from memory_store import MemoryStore
from round_worlds import BASE, SETTINGS, T0, a_client, a_round
from signers import OWNER_KEY

from tributary_accounting import accountant
from tributary_accounting.ledger import Ledger, LedgerBroken
from tributary_api.client import ClientPrivacyStatus, FederatedClient
from tributary_api.shared import StoreEndpoint
from tributary_operator.accounting import AccountantDied, Accounting, LedgerRef, Training
from tributary_operator.clients.decide import ObservedClient, decide
from tributary_operator.rounds.planning import grant
from tributary_operator.store import Records

SMALL = Training(num_examples=100, expected_batch_size=10, steps=1, epsilon="2", delta="1e-3")
IMPOSSIBLE = Training(num_examples=100, expected_batch_size=10, steps=1, epsilon="1e-9", delta="1e-9")
LONGER = {"maxSteps": 20, "expectedBatchSize": 64, "learningRate": "1e-3"}
WAIT_SECONDS = 120


@pytest.fixture
async def accounting() -> AsyncIterator[Accounting]:
    store = MemoryStore()
    records = Records(store, 2)  # type: ignore[arg-type]
    made = Accounting(StoreEndpoint(), store, records, 1)  # type: ignore[arg-type]
    yield made
    made.close()
    records.close()


async def solved(accounting: Accounting, training: Training) -> float:
    """Asks, waits to be woken, and asks again, as a daemon does."""
    awake = asyncio.Event()
    async with asyncio.timeout(WAIT_SECONDS):
        while (sigma := accounting.sigma_if_solved(training, awake.set)) is None:
            await awake.wait()
            awake.clear()
    return sigma


async def test_sigma_is_solved_elsewhere_and_remembered(accounting: Accounting) -> None:
    assert accounting.sigma_if_solved(SMALL, lambda: None) is None
    sigma = await solved(accounting, SMALL)
    assert accounting.sigma_if_solved(SMALL, lambda: None) == sigma
    assert sigma == accountant.noise_multiplier(100, 10, 1, 2.0, 1e-3)


async def test_a_killed_accountant_is_replaced(accounting: Accounting) -> None:
    await solved(accounting, SMALL)
    other = Training(num_examples=100, expected_batch_size=10, steps=2, epsilon="2", delta="1e-3")
    assert accounting.sigma_if_solved(other, lambda: None) is None
    (child,) = accounting.process_ids
    os.kill(child, signal.SIGKILL)
    with pytest.raises(AccountantDied):
        await accounting.epsilon([grant(a_round(), a_client(), BASE, 0.8, SETTINGS.layout).mechanism], "1e-6")
    assert await solved(accounting, other) > 0


async def test_what_no_noise_can_give_is_an_error_each_time(accounting: Accounting) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="raise epsilon"):
            await solved(accounting, IMPOSSIBLE)


async def test_a_ledger_that_was_shortened_is_noticed_after_a_restart(accounting: Accounting) -> None:
    client = a_client()
    ref = LedgerRef.of(client)
    ledger = Ledger(accounting.store, ref.uri, ref.data_set, lambda: T0)
    chain = ledger.reserve(grant(a_round(), client, BASE, 5.0, SETTINGS.layout), client.spec.privacy.budget)
    mirror = client.status.privacy.model_copy(update={"ledger_entries": 1, "ledger_head": chain.head})
    mirrored = client.model_copy(update={"status": client.status.model_copy(update={"privacy": mirror})})
    assert (await accounting.account(mirrored)).chain == chain
    accounting.store.objects.clear()
    with pytest.raises(LedgerBroken):
        await accounting.account(mirrored)
    restarted = Accounting(StoreEndpoint(), accounting.store, Records(accounting.store, 1), 1)
    with pytest.raises(LedgerBroken, match="had 1 entries"):
        await restarted.account(mirrored)
    next_grant = grant(a_round(training=LONGER), client, BASE, 5.0, SETTINGS.layout)
    with pytest.raises(LedgerBroken, match="had 1 entries"):
        await restarted.reserve(ref, next_grant, client.spec.privacy.budget, mirror)
    assert accounting.store.objects == {}
    restarted.close()


async def test_two_rounds_of_three_show_what_they_compose_to_and_not_six(accounting: Accounting) -> None:
    """N = 10 000, batch 256, 800 steps: sigma 1.263 costs epsilon 3 at delta 1e-5."""
    privacy = {
        "budget": {"epsilon": "8", "delta": "1e-5"},
        "maxRoundEpsilon": "3",
        "ledgerUri": "s3://own/l/",
    }
    client = a_client(data={"numExamples": 10_000}, privacy=privacy)
    ref = LedgerRef.of(client)
    ledger = Ledger(accounting.store, ref.uri, ref.data_set, lambda: T0)
    shown = []
    for run in (1, 2):
        fedround = a_round(run=run, training=EIGHT_HUNDRED, privacy={"epsilon": "3", "delta": "1e-5"})
        granted = grant(fedround, client, BASE, 1.263, SETTINGS.layout)
        ledger.reserve(granted, client.spec.privacy.budget)
        shown.append(await status_of(accounting, client))
        ledger.launch(granted, OWNER_KEY.public)
        shown.append(await status_of(accounting, client))
    assert [(s.spent_epsilon, s.reserved_epsilon, s.remaining_epsilon, s.rounds) for s in shown] == [
        ("0.000", "3.000", "5.000", 1),
        ("3.000", "0.000", "5.000", 1),
        ("3.000", "1.353", "3.646", 2),
        ("4.354", "0.000", "3.646", 2),
    ]
    assert shown[-1].ledger_head == ledger.read().head


EIGHT_HUNDRED = {"maxSteps": 800, "expectedBatchSize": 256, "learningRate": "1e-3"}


async def status_of(accounting: Accounting, client: FederatedClient) -> ClientPrivacyStatus:
    return decide(client, ObservedClient(await accounting.account(client)), T0).status.privacy


PARENT = """
import asyncio, sys
from memory_store import MemoryStore
from tributary_api.shared import StoreEndpoint
from tributary_operator.accounting import Accounting, Training
from tributary_operator.store import Records

async def main():
    store = MemoryStore()
    accounting = Accounting(StoreEndpoint(), store, Records(store, 1), 1)
    accounting.sigma_if_solved(Training(100, 10, 1, "2", "1e-3"), lambda: None)
    while not accounting.process_ids:
        await asyncio.sleep(0.01)
    print(*accounting.process_ids, flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_no_process_outlives_a_killed_operator(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment)
    assert parent.stdout is not None
    child = Path(f"/proc/{int(parent.stdout.readline())}")
    time.sleep(1)  # it is still importing: the watch must be there from the start of its work on
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + WAIT_SECONDS
    while child.exists() and "zombie" not in (child / "status").read_text():
        assert time.monotonic() < deadline, "the accountant's process goes on without its operator"
        time.sleep(0.1)

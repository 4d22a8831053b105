"""A round with three clients ends the same whatever is done to one of its writes, or to its watches.

`make test` takes a sample; `make test-faults` every write and every fault.
"""

from __future__ import annotations

import os
from random import Random

import pytest
from fault_plans import Harness
from fault_proxy import AT_A_WRITE, KILLS, OF_WATCHES, Fault

pytestmark = pytest.mark.cluster

PLANS_VARIABLE = "TRIBUTARY_FAULT_PLANS"
"""How many plans; without it a sample of two. `all` for the whole matrix."""
SAMPLE = 2
SEED = 20260
MARGIN = 1.2
"""A plan may write more often than the one without a fault: its last writes are struck, too."""


def matrix(writes: int) -> list[tuple[Fault, int]]:
    """Every kill at every write first, then the other faults of writes, then those of watches."""
    numbers = range(1, int(writes * MARGIN) + 1)
    others = [fault for fault in AT_A_WRITE if fault not in KILLS]
    return [
        *((fault, at) for fault in KILLS for at in numbers),
        *((fault, at) for fault in others for at in numbers),
        *((fault, 0) for fault in OF_WATCHES),
    ]


def chosen(writes: int) -> list[tuple[Fault, int]]:
    plans = matrix(writes)
    wanted = os.environ.get(PLANS_VARIABLE, str(SAMPLE))
    return plans if wanted == "all" else Random(SEED).sample(plans, min(int(wanted), len(plans)))


def test_every_plan_ends_as_the_round_without_a_fault(harness: Harness) -> None:
    for fault, at in chosen(harness.writes_expected):
        plan = harness.run(fault, at)
        print(plan.fault, plan.at, plan.write, plan.seconds, plan.violation or "as without it")
    assert [plan for plan in harness.plans if plan.violation] == []


def test_the_oracle_is_what_the_design_promises(harness: Harness) -> None:
    ending = harness.oracle.ending
    assert ending is not None
    assert ending.model_is_expected
    assert ending.summary == "3/3"
    assert ending.ledgers == [["reserve", "launch", "settle"]] * 3
    assert sorted(ending.workers.values()) == [1, 1, 1, 1]
    assert ending.orphans == 0
    assert ending.writes["create jobs"] == 4

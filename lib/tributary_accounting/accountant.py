"""ε of what was run, and σ for what is planned, by dp-accounting's privacy-loss distributions.

Slow on purpose: one calibration takes seconds and must not run on an event loop.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from threading import Lock

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

from tributary_accounting.mechanism import RELATION, dp_sgd, event
from tributary_api.records import MechanismSpec

DISCRETIZATION = 5e-4
"""Five times coarser than the library's default: σ moves by less than 1e-3 up to 800 steps (at 1e-3 it would
be 2.4e-3), and a calibration takes seconds instead of half a minute."""
SIGMA_BRACKET = (0.25, 8.0)
SIGMA_TOLERANCE = 1e-4
SIGMA_MAX = 64.0

_ONE_AT_A_TIME = Lock()
"""Concurrent reservers of one ledger ask the same question: the first computes, the others find it cached."""


def epsilon(mechanisms: Iterable[MechanismSpec], delta: float) -> float:
    """ε at `delta` of all mechanisms run one after another on the same data set; 0 for none.

    Composed as privacy-loss distributions: adding the ε's would overstate them severalfold.
    """
    counted: dict[MechanismSpec, int] = {}
    for mechanism in mechanisms:
        counted[mechanism] = counted.get(mechanism, 0) + 1
    if not counted:
        return 0.0
    with _ONE_AT_A_TIME:
        return _epsilon(tuple(sorted(counted.items(), key=repr)), delta)


def runs_within(
    budget: float, delta: float, charged: Iterable[MechanismSpec], mechanism: MechanismSpec, at_most: int
) -> int:
    """How many runs of the mechanism fit into the budget beside what is charged; `at_most` at the most.

    ε grows with every run, so it is searched for: one composition where all fit, else about 2·log2(answer).
    """
    spent = list(charged)

    def fits(runs: int) -> bool:
        return runs == 0 or epsilon([*spent, *[mechanism] * runs], delta) <= budget

    if fits(at_most):
        return at_most
    low, high = 0, 1
    while high < at_most and fits(high):
        low, high = high, 2 * high
    high = min(high, at_most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@lru_cache(maxsize=4096)
def _epsilon(counted: tuple[tuple[MechanismSpec, int], ...], delta: float) -> float:
    accountant = _accountant()
    for mechanism, count in counted:
        accountant.compose(event(mechanism), count)
    return float(accountant.get_epsilon(delta))


def rdp_epsilon(mechanism: MechanismSpec, delta: float) -> float:
    """ε of the untruncated mechanism by Rényi DP: an independent cross-check, 10 to 36 % above PLD's."""
    step = dp_accounting.PoissonSampledDpEvent(
        mechanism.sampling_probability, dp_accounting.GaussianDpEvent(mechanism.noise_multiplier)
    )
    accountant = RdpAccountant()
    accountant.compose(step, mechanism.steps)
    return float(accountant.get_epsilon(delta))


@lru_cache(maxsize=4096)
def noise_multiplier(
    num_examples: int, expected_batch_size: int, steps: int, target_epsilon: float, target_delta: float
) -> float:
    """The smallest σ, to 1e-4, with which the training costs at most `target_epsilon` at `target_delta`.

    Never below 0.25, where less noise no longer changes a training and the accountant loses precision.

    Raises:
        ValueError: even σ = 64 costs more, or the batch is larger than the data set.
    """

    def make_event(sigma: float) -> dp_accounting.DpEvent:
        return event(dp_sgd(num_examples, expected_batch_size, steps, sigma, max_grad_norm=1.0))

    def costs_too_much(sigma: float) -> bool:
        mechanism = dp_sgd(num_examples, expected_batch_size, steps, sigma, max_grad_norm=1.0)
        return epsilon([mechanism], target_delta) > target_epsilon

    if not costs_too_much(SIGMA_BRACKET[0]):
        return SIGMA_BRACKET[0]
    low, high = SIGMA_BRACKET
    while costs_too_much(high):
        if high >= SIGMA_MAX:
            raise ValueError(
                f"epsilon {target_epsilon} at delta {target_delta} cannot be had with {steps} steps of "
                f"{expected_batch_size} of {num_examples} examples: raise epsilon, or lower maxSteps "
                "or expectedBatchSize"
            )
        low, high = high, high * 2
    return float(
        dp_accounting.calibrate_dp_mechanism(
            _accountant,
            make_event,
            target_epsilon,
            target_delta,
            bracket_interval=dp_accounting.ExplicitBracketInterval(low, high),
            tol=SIGMA_TOLERANCE,
        )
    )


def _accountant() -> PLDAccountant:
    return PLDAccountant(RELATION, value_discretization_interval=DISCRETIZATION)

"""What docs/privacy.md claims, on the shipped engine. test_seeded_bugs.py shows that each check can fail."""

from __future__ import annotations

import private_engines as engines
import pytest
from privacy_proofs import engine_checks, ledger_checks, randomness_checks

from tributary_accounting import accountant
from tributary_worker.privacy.keystream import derive_key
from tributary_worker.privacy.sampler import PoissonSampler

pytestmark = pytest.mark.usefixtures("alone")


@pytest.mark.filterwarnings("ignore")
def test_norms_per_record(figures):
    figures.oracle_max_rel_err = engine_checks.check_norms_per_record(engines.engine)


def test_step_by_the_book():
    engine_checks.check_step_by_the_book(engines.engine)


def test_sensitivity(figures):
    figures.sensitivity_max_ratio = engine_checks.check_sensitivity(engines.engine)


def test_same_work():
    engine_checks.check_same_work(engines.engine)


def test_coverage():
    engine_checks.check_coverage(engines.engine)


def test_noise_at_the_optimizer(figures):
    figures.noise_std_rel_err = engine_checks.check_noise_at_the_optimizer(engines.engine)


def test_noise_lies_on_a_grid():
    engine_checks.check_noise_lies_on_a_grid(engines.engine)


def test_inclusion_frequency():
    randomness_checks.check_inclusion_frequency(PoissonSampler)


def test_independent_draws():
    randomness_checks.check_independent_draws(PoissonSampler)


def test_batch_cap():
    randomness_checks.check_batch_cap(PoissonSampler)


def test_public_shapes():
    randomness_checks.check_public_shapes(PoissonSampler)


def test_keys_belong_to_one_computation():
    randomness_checks.check_keys_belong_to_one_computation(derive_key)


def test_composition():
    ledger_checks.check_composition(accountant.epsilon)


@pytest.mark.privacy_matrix
def test_reference_sigmas():
    ledger_checks.check_reference_sigmas(accountant.noise_multiplier)


def test_killed_at_every_write():
    ledger_checks.check_killed_at_every_write(ledger_checks.ledger_on)


def test_reservers_in_a_race():
    ledger_checks.check_reservers_in_a_race(ledger_checks.ledger_on)

"""σ and ε against published figures, an independent accountant and the laws of composition."""

import pytest

from tributary_accounting import accountant
from tributary_accounting.mechanism import batch_cap, dp_sgd, rounded_num_examples

N, BATCH, DELTA = 10_000, 256, 1e-5

# Computed with dp-accounting's default discretization, untruncated Poisson sampling, add/remove relation.
TABLE = [(40, 1, 1.1225), (40, 3, 0.7468), (200, 3, 0.9052), (200, 8, 0.6212), (800, 8, 0.7781)]


@pytest.mark.parametrize(("steps", "epsilon", "sigma"), TABLE)
def test_noise_multiplier_matches_the_reference(steps, epsilon, sigma):
    found = accountant.noise_multiplier(N, BATCH, steps, float(epsilon), DELTA)
    assert found == pytest.approx(sigma, abs=1e-3)


def test_calibration_never_costs_more_than_asked_and_agrees_with_rdp():
    sigma = accountant.noise_multiplier(N, BATCH, 40, 3.0, DELTA)
    mechanism = dp_sgd(N, BATCH, 40, sigma, 0.5)
    spent = accountant.epsilon([mechanism], DELTA)
    assert 2.99 < spent <= 3.0
    assert spent <= accountant.rdp_epsilon(mechanism, DELTA) <= 1.4 * spent


def test_two_runs_cost_more_than_one_and_less_than_their_sum():
    sigma = accountant.noise_multiplier(N, BATCH, 40, 3.0, DELTA)
    mechanism = dp_sgd(N, BATCH, 40, sigma, 0.5)
    both = accountant.epsilon([mechanism, mechanism], DELTA)
    assert 3.0 < both < 4.5
    assert accountant.epsilon([], DELTA) == 0.0


@pytest.mark.parametrize("budget", [2.9, 3.5, 4.4, 8.0])
def test_the_budget_holds_so_many_runs_and_not_one_more(budget):
    mechanism = dp_sgd(N, BATCH, 800, 1.2630, 0.5)
    charged = [dp_sgd(N, BATCH, 40, 0.7468, 0.5)] if budget == 8.0 else []
    runs = accountant.runs_within(budget, DELTA, charged, mechanism, at_most=50)
    assert accountant.epsilon([*charged, *[mechanism] * runs], DELTA) <= budget
    assert accountant.epsilon([*charged, *[mechanism] * (runs + 1)], DELTA) > budget
    assert accountant.runs_within(budget, DELTA, charged, mechanism, at_most=1) == min(runs, 1)


def test_a_loose_epsilon_still_gets_noise():
    assert accountant.noise_multiplier(8_100, 64, 20, 500.0, DELTA) == accountant.SIGMA_BRACKET[0]


def test_an_impossible_epsilon_names_what_to_change():
    with pytest.raises(ValueError, match="raise epsilon, or lower maxSteps"):
        accountant.noise_multiplier(1_000, 640, 20_000, 0.01, DELTA)


def test_a_batch_above_the_data_set_is_refused():
    with pytest.raises(ValueError, match="lower it"):
        dp_sgd(100, 101, 1, 1.0, 1.0)


@pytest.mark.parametrize(
    ("declared", "counted"), [(1, 1), (99, 99), (8_142, 8_100), (20_999, 20_000), (100, 100)]
)
def test_examples_are_rounded_down_to_two_digits(declared, counted):
    assert rounded_num_examples(declared) == counted


def test_the_cap_is_five_deviations_up_but_never_above_the_data_set():
    assert batch_cap(10_000, 256) == 335
    assert batch_cap(10, 10) == 10

"""4.7: what adversaries can show stays below the claim, and rises above it when the engine is broken."""

from __future__ import annotations

import numpy as np
import pytest
from privacy_proofs import engine_defects as defects
from privacy_proofs.figures import Audit, SeededBug

from tributary_worker import audit
from tributary_worker.auditing.bounds import Errors, bound_of_error_rates, bound_of_one_run, bound_of_runs
from tributary_worker.auditing.estimators import AuditPlan, audit_many_runs, audit_one_run
from tributary_worker.failures import StageFailure
from tributary_worker.privacy.noise import GaussianNoise

pytestmark = pytest.mark.usefixtures("alone")

PLAN = AuditPlan()
HONEST = audit.canary_engines(zero_stage=2, keys=(bytes(range(32)), bytes(range(32, 64))))
LOOSE = AuditPlan(epsilon=2.0, runs=100, canaries=400)
"""With few runs and canaries no adversary can show more than 3, whatever it sees."""


def engines_with(change):
    """Audited engines with something wrong."""

    def make(model, mechanism):
        private = HONEST(model, mechanism)
        change(private)
        return private

    return make


def noise_of(kind, strength=1.0):
    def change(private):
        private.optimizer.noise = kind(bytes(32), strength * private.noise_std)

    return change


def unclipped(private):
    private.__class__ = defects.Unclipped


def test_audit(figures):
    receipt = audit.audit(PLAN, HONEST, zero_stage=2)
    audit.check(receipt)
    figures.audit = Audit(receipt.epsilon_claimed, receipt.epsilon_lower_bound)
    assert receipt.epsilon_claimed == pytest.approx(PLAN.epsilon, rel=0.01)
    # An adversary that learns nothing would prove nothing.
    assert all(finding.epsilon_lower_bound > 0.5 for finding in receipt.findings)


BUGS = {
    "no noise (by audit)": noise_of(defects.NoNoise),
    "noise a quarter of what is due (by audit)": noise_of(GaussianNoise, 0.25),
    "no clipping (by audit)": unclipped,
}


@pytest.mark.parametrize("name", BUGS)
def test_a_broken_engine_is_found_by_its_audit(name, figures):
    receipt = audit.audit(LOOSE, engines_with(BUGS[name]), zero_stage=2)
    with pytest.raises(StageFailure, match="do not train"):
        audit.check(receipt)
    figures.seeded_bugs.append(SeededBug(name, test_audit.__name__))


@pytest.mark.parametrize("estimate", [audit_many_runs, audit_one_run])
def test_each_adversary_finds_missing_noise_alone(estimate):
    finding = estimate(engines_with(noise_of(defects.NoNoise)), LOOSE)
    assert finding.epsilon_lower_bound > finding.epsilon_claimed


def randomised_response(epsilon, count, generator):
    """Scores of the mechanism whose epsilon is known exactly: a bit, flipped with chance 1 / (1 + e^eps)."""
    present = generator.random(count) < 0.5
    flipped = generator.random(count) < 1 / (1 + np.exp(epsilon))
    return (present ^ flipped) + 1e-9 * generator.random(count), present


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 3.0])
def test_bounds_hold_for_a_mechanism_of_known_epsilon_and_come_near(epsilon):
    """At 95 % confidence one in twenty may exceed; more than eleven of fifty would happen once in 1e5."""
    generator = np.random.default_rng(1)
    exceeded = {"runs": 0, "one run": 0}
    largest = 0.0
    for _ in range(50):
        scores, present = randomised_response(epsilon, 400, generator)
        runs = bound_of_runs(scores[~present], scores[present], 0.0, 0.95)
        one = bound_of_one_run(scores, present, 0.0, 0.95)
        exceeded["runs"] += runs > epsilon
        exceeded["one run"] += one > epsilon + 1e-3
        largest = max(largest, runs, one)
    assert max(exceeded.values()) <= 11
    assert largest > 0.6 * epsilon


def test_the_bound_of_error_rates_against_a_figure_worked_out_by_hand():
    """0 of 100 errors on both sides: Clopper and Pearson's upper rate is 1 - risk ** (1/100)."""
    rate = 1 - 0.025**0.01
    expected = np.log((1 - 1e-5 - rate) / rate)
    assert bound_of_error_rates(Errors(0, 100), Errors(0, 100), 1e-5, 0.95) == pytest.approx(expected)
    assert bound_of_error_rates(Errors(50, 100), Errors(50, 100), 1e-5, 0.95) == 0.0
    assert bound_of_error_rates(Errors(100, 100), Errors(0, 100), 1e-5, 0.95) == 0.0

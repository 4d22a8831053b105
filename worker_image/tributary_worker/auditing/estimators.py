"""Two adversaries against the real engine, and the lower bounds of epsilon that they reach."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from tributary_accounting import accountant
from tributary_accounting.mechanism import dp_sgd
from tributary_api.audits import AuditFinding
from tributary_api.records import MechanismSpec
from tributary_worker.auditing.bounds import bound_of_one_run, bound_of_runs
from tributary_worker.auditing.canaries import CanaryModel, evidence
from tributary_worker.privacy.engine import PrivateEngine

MakeEngine = Callable[[CanaryModel, MechanismSpec], PrivateEngine]
"""The engine under audit, around a model of canaries."""

TARGET = 0
"""The canary of the many runs; the other records are known to the adversary and always there."""
RECORDS, EXPECTED_BATCH = 8, 4
"""Of the many runs: half of the records take part in a step, so that the sampler is audited too."""
COINS_SEED = 0
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True, slots=True)
class AuditPlan:
    """What is audited, and how hard the adversaries try. The confidence is that of each bound."""

    epsilon: float = 8.0
    delta: float = 1e-5
    steps: int = 4
    runs: int = 500
    """With the canary, and as many without."""
    canaries: int = 1000
    """Of the one run."""
    confidence: float = 0.975


def audit_many_runs(make_engine: MakeEngine, plan: AuditPlan) -> AuditFinding:
    """One canary in a Poisson-sampled training that is repeated; it is there in every second run."""
    mechanism = _mechanism(plan, RECORDS, EXPECTED_BATCH)
    engine = make_engine(CanaryModel(RECORDS), mechanism)
    scores: tuple[list[float], list[float]] = ([], [])
    for run in range(2 * plan.runs):
        is_present = torch.ones(RECORDS)
        is_present[TARGET] = run % 2
        scores[run % 2].append(evidence(engine, is_present, run * plan.steps)[TARGET])
    bound = bound_of_runs(np.array(scores[0]), np.array(scores[1]), plan.delta, plan.confidence)
    return _finding("many-runs", mechanism, bound, plan)


def audit_one_run(make_engine: MakeEngine, plan: AuditPlan) -> AuditFinding:
    """Many canaries in a single training with full batches, each there by the toss of a coin."""
    mechanism = _mechanism(plan, plan.canaries, plan.canaries)
    engine = make_engine(CanaryModel(plan.canaries), mechanism)
    included = np.random.default_rng(COINS_SEED).random(plan.canaries) < 0.5
    scores = evidence(engine, torch.from_numpy(included.astype(np.float32)), 0)
    bound = bound_of_one_run(scores, included, plan.delta, plan.confidence)
    return _finding("one-run", mechanism, bound, plan)


def _mechanism(plan: AuditPlan, records: int, expected_batch: int) -> MechanismSpec:
    sigma = accountant.noise_multiplier(records, expected_batch, plan.steps, plan.epsilon, plan.delta)
    return dp_sgd(records, expected_batch, plan.steps, sigma, MAX_GRAD_NORM)


def _finding(estimator: str, mechanism: MechanismSpec, bound: float, plan: AuditPlan) -> AuditFinding:
    return AuditFinding(
        estimator=estimator,
        mechanism=mechanism,
        epsilon_claimed=round(accountant.epsilon([mechanism], plan.delta), 4),
        epsilon_lower_bound=round(bound, 4),
    )

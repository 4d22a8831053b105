"""The plan of a round: who takes part, with what grant, at what quorum. Frozen before anything is spent."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from datetime import datetime

from tributary_accounting.mechanism import dp_sgd, rounded_num_examples
from tributary_accounting.signatures import SigningKey
from tributary_api.client import FederatedClient
from tributary_api.meta import NamespacedName
from tributary_api.records import Grant, MechanismSpec, PlannedClient, RoundPlan, computation_digest
from tributary_api.round import ClientFailure, FederatedRound
from tributary_api.shared import ModelRef
from tributary_operator.accounting import Training
from tributary_operator.rounds.eligibility import name_of
from tributary_store.keys import Layout


def training_of(fedround: FederatedRound, num_examples: int) -> Training:
    """The public numbers that σ follows from, for a client of this (rounded) size."""
    spec = fedround.spec
    return Training(
        num_examples=num_examples,
        expected_batch_size=spec.training.expected_batch_size,
        steps=spec.training.max_steps,
        epsilon=spec.privacy.epsilon,
        delta=spec.privacy.delta,
    )


def rounded(client: FederatedClient) -> int:
    return rounded_num_examples(client.spec.data.num_examples)


def mechanism(fedround: FederatedRound, client: FederatedClient, sigma: float) -> MechanismSpec:
    spec = fedround.spec
    return dp_sgd(
        rounded(client),
        spec.training.expected_batch_size,
        spec.training.max_steps,
        sigma,
        float(spec.privacy.max_grad_norm),
    )


def grant(
    fedround: FederatedRound, client: FederatedClient, base_model: ModelRef, sigma: float, layout: Layout
) -> Grant:
    spec = fedround.spec
    return Grant(
        run_key=fedround.run_key,
        hub_namespace=fedround.metadata.namespace,
        round_name=fedround.metadata.name,
        client=name_of(client),
        data_name=client.spec.data.name,
        base_model_digest=base_model.digest,
        mechanism=mechanism(fedround, client, sigma),
        epsilon=spec.privacy.epsilon,
        delta=spec.privacy.delta,
        delta_uri=layout.delta(name_of(client), fedround.run_key),
        computation=computation_digest(spec.method, spec.training, spec.task),
    )


def drawn(fedround: FederatedRound, eligible: Sequence[FederatedClient]) -> list[FederatedClient]:
    """The cohort: all, or a sample that depends on seed and run alone: planning twice draws the same."""
    ordered = sorted(eligible, key=lambda c: str(name_of(c)))
    sample = fedround.spec.clients.sample
    if sample is None or sample.count >= len(ordered):
        return ordered

    def ticket(client: FederatedClient) -> bytes:
        return hashlib.sha256(f"{sample.seed}/{fedround.run_key}/{name_of(client)}".encode()).digest()

    winners = {name_of(c) for c in sorted(ordered, key=ticket)[: sample.count]}
    return [client for client in ordered if name_of(client) in winners]


def quorum(fedround: FederatedRound, cohort_size: int) -> int:
    """How many of the cohort must deliver: a count as it is, a percentage rounded up, at least one."""
    wanted = fedround.spec.clients.min_available
    if isinstance(wanted, int):
        return max(1, wanted)
    if wanted.endswith("%"):
        return max(1, math.ceil(cohort_size * int(wanted[:-1]) / 100))
    return max(1, int(wanted))


def plan(
    fedround: FederatedRound,
    cohort: Sequence[tuple[FederatedClient, Grant]],
    excluded: Sequence[ClientFailure],
    *,
    base_model: ModelRef,
    worker_image: str,
    signing_key: SigningKey,
    now: datetime,
) -> RoundPlan:
    """The signed plan: the same bytes for the same facts."""
    return RoundPlan(
        run_key=fedround.run_key,
        round=fedround.ref,
        base_model=base_model,
        worker_image=worker_image,
        cohort=[_planned(fedround, client, granted, signing_key) for client, granted in cohort],
        excluded=list(excluded),
        quorum=quorum(fedround, len(cohort)),
        planned_at=now,
    )


def _planned(
    fedround: FederatedRound, client: FederatedClient, granted: Grant, signing_key: SigningKey
) -> PlannedClient:
    by_examples = fedround.spec.aggregation.weighting == "NumExamples"
    return PlannedClient(
        client=granted.client,
        grant=granted,
        grant_signature=signing_key.sign(granted),
        weight=float(client.spec.data.num_examples) if by_examples else 1.0,
        ledger_uri=client.spec.privacy.ledger_uri,
        nodes=client.spec.worker.nodes,
    )


def data_set(planned: PlannedClient) -> NamespacedName:
    """Identity of the client's data in its ledger."""
    return NamespacedName(namespace=planned.client.namespace, name=planned.grant.data_name)

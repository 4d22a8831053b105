"""From the selected clients to a frozen plan; nothing is reserved or started before it exists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from tributary_api.client import FederatedClient
from tributary_api.round import ClientFailure, FederatedRound
from tributary_api.shared import ModelRef
from tributary_operator.decision import AT_ONCE, PutRecord, Waiting
from tributary_operator.rounds.eligibility import failure, name_of, objection
from tributary_operator.rounds.observed import Candidate, Selection
from tributary_operator.rounds.planning import drawn, grant, plan, quorum, rounded
from tributary_operator.rounds.situation import Situation

LOOK_AGAIN_AFTER = timedelta(seconds=60)
COHORT_MAX = 150
"""The aggregator's task is one environment variable, of which Linux passes 128 KiB; a client takes up to 800
bytes of it."""
"""What stalls a plan usually changes with an event; an owner's ledger or a role binding has none."""


@dataclass(frozen=True, slots=True)
class Screening:
    """Who may take part, and why the others may not."""

    eligible: tuple[FederatedClient, ...]
    excluded: tuple[ClientFailure, ...]


def agreeing(s: Situation, candidates: Sequence[Candidate]) -> Screening:
    """By what the objects say; noise and budget are asked of the rest."""
    judged = [(c.client, objection(c, s.fedround, s.settings.worker_image, s.now)) for c in candidates]
    return Screening(
        eligible=tuple(client for client, problem in judged if problem is None),
        excluded=tuple(problem for _, problem in judged if problem is not None),
    )


def screened(s: Situation, selection: Selection) -> Screening:
    """With noise and budget, as far as they are known."""
    first = agreeing(s, selection.candidates)
    judged = [(client, _unaffordable(client, selection)) for client in first.eligible]
    return Screening(
        eligible=tuple(client for client, problem in judged if problem is None),
        excluded=(*first.excluded, *(problem for _, problem in judged if problem is not None)),
    )


def _unaffordable(client: FederatedClient, selection: Selection) -> ClientFailure | None:
    if problem := selection.unsolvable.get(rounded(client)):
        return failure(name_of(client), "NoiseUnsolvable", problem)
    return (selection.budget_problems or {}).get(name_of(client))


def plan_round(s: Situation) -> Waiting:
    selection = s.seen.selection
    if selection is None:
        return Waiting("Planning", "looking for clients")
    base = selection.base_model
    if base.ref is None:
        return Waiting(base.reason, base.message, stalled=base.is_stalled, poll_after=LOOK_AGAIN_AFTER)
    if not selection.candidates:
        return _no_client(s.fedround)
    who = screened(s, selection)
    unsolved = {rounded(client) for client in who.eligible} - selection.sigmas.keys()
    if unsolved:
        return Waiting("Planning", f"solving for the noise multiplier of {len(unsolved)} sizes of data set")
    if who.eligible and selection.budget_problems is None:
        message = f"asking the privacy ledgers of {len(who.eligible)} clients"
        return Waiting("Planning", message, poll_after=AT_ONCE)
    return _frozen(s, selection, base.ref, who)


def _frozen(s: Situation, selection: Selection, base_model: ModelRef, who: Screening) -> Waiting:
    cohort = drawn(s.fedround, who.eligible)
    needed = quorum(s.fedround, len(cohort))
    if needed > len(cohort):
        return _impossible(needed, who)
    if needed < s.fedround.spec.aggregation.clients_min:
        return _too_few(s.fedround, needed)
    if len(cohort) > COHORT_MAX:
        return _too_many(len(cohort))
    layout = s.settings.layout
    granted = [(c, grant(s.fedround, c, base_model, selection.sigmas[rounded(c)], layout)) for c in cohort]
    frozen = plan(
        s.fedround,
        granted,
        who.excluded,
        base_model=base_model,
        worker_image=s.settings.worker_image,
        signing_key=s.settings.signing_key,
        now=s.now,
    )
    return Waiting(
        reason="Planning",
        message=f"freezing a cohort of {len(cohort)} clients",
        record=(PutRecord(layout.plan(s.fedround.run_key), frozen),),
        poll_after=AT_ONCE,
    )


def _too_many(clients: int) -> Waiting:
    return Waiting(
        "CohortTooLarge",
        f"{clients} clients may take part and a round can have {COHORT_MAX}: create another round with "
        f"clients.sample.count up to {COHORT_MAX}; nothing was started or spent",
        stalled=True,
        poll_after=LOOK_AGAIN_AFTER,
    )


def _no_client(fedround: FederatedRound) -> Waiting:
    chosen = fedround.spec.clients
    message = (
        f"no FederatedClient with the labels {chosen.selector.match_labels} in a namespace with the labels "
        f"{chosen.namespace_selector.match_labels}: label one, or create another "
        "round (a namespace shows its labels only where its owner has applied the chart tributary-client)"
    )
    return Waiting("NoClientSelected", message, stalled=True, poll_after=LOOK_AGAIN_AFTER)


def _impossible(needed: int, who: Screening) -> Waiting:
    reasons = ", ".join(f"{p.client}: {p.reason}" for p in who.excluded[:5]) or "none was excluded"
    return Waiting(
        "QuorumImpossible",
        f"clients.minAvailable needs {needed} clients and {len(who.eligible)} may take part ({reasons}): "
        "nothing was started or spent",
        stalled=True,
        poll_after=LOOK_AGAIN_AFTER,
    )


def _too_few(fedround: FederatedRound, needed: int) -> Waiting:
    """The quorum alone would be too few deltas for the strategy: the whole cohort's budget would be lost."""
    aggregation = fedround.spec.aggregation
    return Waiting(
        "StrategyImpossible",
        f"{aggregation.strategy} needs {aggregation.clients_min} deltas and the quorum is {needed}: create "
        "another round with more clients, a larger clients.minAvailable, fewer byzantineClients or FedAvg; "
        "nothing was started or spent",
        stalled=True,
        poll_after=LOOK_AGAIN_AFTER,
    )

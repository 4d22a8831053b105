"""Gathers what a plan is made from: clients, access, the base model, noise, and what the ledgers allow."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from tributary_accounting.ledger import LedgerBroken
from tributary_api.client import FederatedClient
from tributary_api.meta import NamespacedName
from tributary_api.round import ClientFailure, FederatedRound
from tributary_operator import names
from tributary_operator.api import Forbidden
from tributary_operator.clients.reading import readable
from tributary_operator.kinds import CLIENT
from tributary_operator.reconciler import World
from tributary_operator.rounds.eligibility import failure, name_of, overlapping
from tributary_operator.rounds.models import resolve
from tributary_operator.rounds.observed import Candidate, ObservedRound, Selection
from tributary_operator.rounds.planning import mechanism, rounded, training_of
from tributary_operator.rounds.selecting import agreeing
from tributary_operator.rounds.situation import Situation
from tributary_store.errors import StoreError, StoreUnreachable


async def select(world: World, fedround: FederatedRound, owner: str, *, ask_ledgers: bool) -> Selection:
    """`ask_ledgers` is put off by a pass, so that the status says what takes the time."""
    base = await resolve(world, fedround.metadata.namespace, fedround.spec.base_model)
    if base.ref is None:
        return Selection(base)
    candidates = await _candidates(world, fedround, owner)
    selection = Selection(base, candidates)
    seen = ObservedRound(selection=selection)
    agreed = agreeing(Situation(fedround, seen, world.settings, world.clock()), candidates).eligible
    selection = _with_noise(world, fedround, selection, agreed, owner)
    solved = [client for client in agreed if rounded(client) in selection.sigmas]
    is_solved = len(solved) == len([c for c in agreed if rounded(c) not in selection.unsolvable])
    if not (ask_ledgers and is_solved):
        return selection
    return replace(selection, budget_problems=await _budget_problems(world, fedround, selection, solved))


async def _candidates(world: World, fedround: FederatedRound, owner: str) -> tuple[Candidate, ...]:
    """Listed afresh: a watch that has only just begun would freeze a cohort that is too small."""
    items, _ = await world.cluster.find(CLIENT, None, {})
    everyone = readable(items)
    selected = await _selected(world, fedround, everyone)
    hub = fedround.metadata.namespace
    denied = await world.jobs.retain(owner, {hub, *(c.metadata.namespace for c in selected)})
    if hub in denied:
        raise denied[hub].error
    problems = {namespace: str(found.error) for namespace, found in denied.items()}
    doubles = overlapping(everyone)
    return tuple(
        Candidate(
            client=client,
            access_problem=problems.get(client.metadata.namespace, ""),
            data_overlaps=str(doubles.get(name_of(client), "")),
        )
        for client in selected
    )


async def _selected(
    world: World, fedround: FederatedRound, everyone: list[FederatedClient]
) -> list[FederatedClient]:
    chosen = fedround.spec.clients
    labelled = [c for c in everyone if chosen.selector.match_labels.items() <= c.metadata.labels.items()]
    namespaces = sorted({c.metadata.namespace for c in labelled})
    wanted = chosen.namespace_selector.match_labels
    matches = await asyncio.gather(*(_namespace_matches(world, ns, wanted) for ns in namespaces))
    matching = {namespace for namespace, match in zip(namespaces, matches, strict=True) if match}
    return [client for client in labelled if client.metadata.namespace in matching]


async def _namespace_matches(world: World, namespace: str, wanted: Mapping[str, str]) -> bool:
    """Its name is known; its other labels may be read only where the owner has bound our role."""
    rest = dict(wanted)
    if rest.pop(names.NAMESPACE_NAME, namespace) != namespace:
        return False
    if not rest:
        return True
    try:
        labels = await world.cluster.namespace_labels(namespace)
    except Forbidden:
        return False
    return rest.items() <= labels.items()


def _with_noise(
    world: World,
    fedround: FederatedRound,
    selection: Selection,
    agreed: tuple[FederatedClient, ...],
    owner: str,
) -> Selection:
    sigmas: dict[int, float] = {}
    unsolvable: dict[int, str] = {}
    for n in sorted({rounded(client) for client in agreed}):
        try:
            sigma = world.accounting.sigma_if_solved(training_of(fedround, n), lambda: world.wake(owner))
        except ValueError as error:
            unsolvable[n] = str(error)
            continue
        if sigma is not None:
            sigmas[n] = sigma
    return replace(selection, sigmas=sigmas, unsolvable=unsolvable)


async def _budget_problems(
    world: World, fedround: FederatedRound, selection: Selection, clients: list[FederatedClient]
) -> dict[NamespacedName, ClientFailure]:
    found = await asyncio.gather(*(_budget_problem(world, fedround, selection, c) for c in clients))
    return {name_of(c): problem for c, problem in zip(clients, found, strict=True) if problem is not None}


async def _budget_problem(
    world: World, fedround: FederatedRound, selection: Selection, client: FederatedClient
) -> ClientFailure | None:
    try:
        account = await world.accounting.account(client)
    except StoreUnreachable:
        raise
    except LedgerBroken as error:
        return failure(name_of(client), "LedgerBroken", str(error))
    except StoreError as error:
        return failure(name_of(client), "LedgerUnreachable", str(error))
    if selection.base_model.ref is None or account.chain.state(fedround.run_key) is not None:
        return None  # this very run is charged already: an earlier plan was lost, not the reservation
    asked = mechanism(fedround, client, selection.sigmas[rounded(client)])
    budget = client.spec.privacy.budget
    after = await world.accounting.epsilon([*account.chain.charged(), asked], budget.delta)
    if after <= float(budget.epsilon):
        return None
    message = (
        f"epsilon would be {after:.2f} of {budget.epsilon} (now {account.charged_epsilon:.2f}): "
        "ask for a smaller epsilon, or the owner raises spec.privacy.budget"
    )
    return failure(name_of(client), "BudgetExceeded", message)

"""Whether a client may take part in a round: every rule has a reason that the owner or the hub can act on."""

from __future__ import annotations

from datetime import datetime

from tributary_accounting.mechanism import rounded_num_examples
from tributary_api.client import FederatedClient
from tributary_api.meta import NamespacedName
from tributary_api.round import ClientFailure, FederatedRound
from tributary_api.shared import TaskKind
from tributary_operator.rounds.observed import Candidate


def name_of(client: FederatedClient) -> NamespacedName:
    return NamespacedName(namespace=client.metadata.namespace, name=client.metadata.name)


def failure(client: NamespacedName, reason: str, message: str) -> ClientFailure:
    return ClientFailure(client=str(client), reason=reason, message=message[:1024])


def objection(
    candidate: Candidate, fedround: FederatedRound, worker_image: str, now: datetime
) -> ClientFailure | None:
    """Why the candidate is left out, budget aside; the first rule that speaks."""
    client = candidate.client
    if withdrawn := withdrawal(client, fedround.metadata.namespace, now):
        return withdrawn
    rules = (
        _asks_too_much(client, fedround),
        _states_too_large_a_delta(client, fedround),
        _image_is_refused(client, worker_image),
        _batch_is_too_large(client, fedround),
        _labels_are_missing(client, fedround),
        (
            "OverlappingData",
            f"its data overlap with those of {candidate.data_overlaps}, which is older: delete one",
        )
        if candidate.data_overlaps
        else None,
        ("NoAccess", no_access(name_of(client), candidate.access_problem))
        if candidate.access_problem
        else None,
    )
    return next((failure(name_of(client), *rule) for rule in rules if rule is not None), None)


def withdrawal(client: FederatedClient, hub_namespace: str, now: datetime) -> ClientFailure | None:
    """Why the client does not (or no longer) agree; asked again while its worker runs."""
    consent, name = client.spec.consent, name_of(client)
    if client.spec.suspend:
        return failure(name, "Suspended", "spec.suspend is true")
    if hub_namespace not in {hub.namespace for hub in consent.hubs}:
        return failure(
            name, "ConsentMissing", f"spec.consent.hubs does not name the namespace {hub_namespace}"
        )
    if now >= consent.expires:
        return failure(name, "ConsentExpired", f"spec.consent.expires was {consent.expires.isoformat()}")
    return None


def _asks_too_much(client: FederatedClient, fedround: FederatedRound) -> tuple[str, str] | None:
    wanted, allowed = fedround.spec.privacy.epsilon, client.spec.privacy.max_round_epsilon
    if float(wanted) <= float(allowed):
        return None
    return (
        "RoundEpsilonTooLarge",
        f"the round asks for epsilon {wanted}, spec.privacy.maxRoundEpsilon is {allowed}",
    )


def _states_too_large_a_delta(client: FederatedClient, fedround: FederatedRound) -> tuple[str, str] | None:
    wanted, allowed = fedround.spec.privacy.delta, client.spec.privacy.budget.delta
    if float(wanted) <= float(allowed):
        return None
    return (
        "DeltaTooLarge",
        f"the round states its epsilon at delta {wanted}, spec.privacy.budget.delta is {allowed}",
    )


def _image_is_refused(client: FederatedClient, worker_image: str) -> tuple[str, str] | None:
    if worker_image in client.spec.worker.allowed_images:
        return None
    return "ImageNotAllowed", f"spec.worker.allowedImages does not hold {worker_image}"


def _batch_is_too_large(client: FederatedClient, fedround: FederatedRound) -> tuple[str, str] | None:
    batch, n = fedround.spec.training.expected_batch_size, rounded_num_examples(client.spec.data.num_examples)
    if batch <= n:
        return None
    return (
        "BatchTooLarge",
        f"expectedBatchSize {batch} is larger than the {n} declared examples (rounded down)",
    )


def _labels_are_missing(client: FederatedClient, fedround: FederatedRound) -> tuple[str, str] | None:
    if fedround.spec.task is not TaskKind.SEQUENCE_CLASSIFICATION or client.spec.data.label_field:
        return None
    return (
        "LabelFieldMissing",
        f"the task {fedround.spec.task} needs labels: name them in spec.data.labelField",
    )


def no_access(client: NamespacedName, problem: str) -> str:
    return f"install the chart tributary-client in namespace {client.namespace}: {problem}"


def overlapping(clients: list[FederatedClient]) -> dict[NamespacedName, NamespacedName]:
    """Clients whose data overlap with those of an older one: their records would have two budgets."""
    found: dict[NamespacedName, NamespacedName] = {}
    ordered = sorted(clients, key=_age)
    for i, client in enumerate(ordered):
        for older in ordered[:i]:
            if name_of(older) not in found and _overlap(client, older):
                found[name_of(client)] = name_of(older)
                break
    return found


def _age(client: FederatedClient) -> tuple[str, str, str]:
    created = client.metadata.creation_timestamp
    return client.metadata.namespace, created.isoformat() if created else "", client.metadata.name


def _overlap(one: FederatedClient, other: FederatedClient) -> bool:
    if one.metadata.namespace != other.metadata.namespace:
        return False
    a, b = _folder(one), _folder(other)
    return one.spec.data.name == other.spec.data.name or a.startswith(b) or b.startswith(a)


def _folder(client: FederatedClient) -> str:
    return client.spec.data.uri.rstrip("/") + "/"

"""Whether this training is what the data owner agreed to, asked once more from inside the owner's namespace.

The hub is not trusted: the operator that made the pod has checked all this, and the worker checks it again
against the owner's own object and ledger, before it reads a single record, and charges the ledger before its
first step.
"""

from __future__ import annotations

import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from tributary_accounting import accountant, ledger
from tributary_accounting.mechanism import batch_cap
from tributary_accounting.signatures import SignatureRefused, verify
from tributary_api.base import GROUP, VERSION
from tributary_api.client import FederatedClient, FederatedClientSpec, PrivacyBudget
from tributary_api.failures import Reason
from tributary_api.meta import NamespacedName
from tributary_api.records import Grant, computation_digest
from tributary_api.tasks import TrainTask
from tributary_store.keys import Layout
from tributary_store.objects import bucket_and_key
from tributary_worker.failures import StageFailure
from tributary_worker.store_access import store_failures

SERVICE_ACCOUNT_PATH = "/var/run/secrets/kubernetes.io/serviceaccount"
"""Where the kubelet puts token and ca.crt."""

REQUEST_TIMEOUT_SECONDS = 20
EPSILON_TOLERANCE = 1e-3
"""Relative; the accountant's own discretization moves epsilon by less."""


@dataclass(frozen=True, slots=True)
class ApiServer:
    """The Kubernetes API server, under the pod's service account."""

    url: str
    account: Path

    @classmethod
    def of_cluster(cls, account: Path) -> ApiServer:
        """The server that the kubelet names in the environment of every pod; `account` holds token and
        ca.crt."""
        host, port = (
            os.environ.get("KUBERNETES_SERVICE_HOST"),
            os.environ.get("KUBERNETES_SERVICE_PORT", "443"),
        )
        if not host:
            raise StageFailure(
                Reason.CONSENT_REFUSED, "no Kubernetes API server: consent cannot be checked here"
            )
        return cls(f"https://{f'[{host}]' if ':' in host else host}:{port}", account)

    def client(self, name: NamespacedName) -> FederatedClient:
        """The owner's FederatedClient as it is now."""
        path = f"/apis/{GROUP}/{VERSION}/namespaces/{name.namespace}/{FederatedClient.PLURAL}/{name.name}"
        request = urllib.request.Request(self.url + path)
        try:
            request.add_header("Authorization", f"Bearer {(self.account / 'token').read_text().strip()}")
            context = ssl.create_default_context(cafile=str(self.account / "ca.crt"))
            with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_SECONDS, context=context) as answer:
                return FederatedClient.model_validate(json.load(answer))
        except urllib.error.HTTPError as error:
            raise _refused(name, error.code) from error
        except (OSError, ValueError) as error:
            message = f"the API server gave no FederatedClient {name} ({type(error).__name__})"
            raise StageFailure(Reason.CONSENT_REFUSED, message, retryable=True) from error


def _refused(name: NamespacedName, status: int) -> StageFailure:
    if status >= 500:
        return StageFailure(
            Reason.CONSENT_REFUSED, f"the API server answered {status} about {name}", retryable=True
        )
    return StageFailure(
        Reason.CONSENT_REFUSED,
        f"FederatedClient {name} cannot be read (HTTP {status}): it must exist, and the worker's service "
        "account needs the role of the tenant's chart",
    )


def check_consent(task: TrainTask, client: FederatedClient, receipt_key: str, now: datetime) -> None:
    """Raise unless the owner, as of `now`, agrees to this very task. `receipt_key` is what follows from the
    owner's Secret."""
    if reason := next(_objections(task, client, receipt_key, now), None):
        raise StageFailure(Reason.CONSENT_REFUSED, f"{task.grant.client}: {reason}")


def check_grant(task: TrainTask) -> None:
    """Raise unless the grant is as the hub signed it, the task's parameters are those of its grant, and cost
    no more than it says. Takes seconds."""
    try:
        verify(task.grant, task.grant_signature)
    except SignatureRefused as error:
        raise StageFailure(Reason.GRANT_REFUSED, f"{error}: the hub must plan the round again") from error
    if reason := next(_contradictions(task), None):
        raise StageFailure(Reason.GRANT_REFUSED, reason)


def check_reservation(book: ledger.Ledger, grant: Grant, budget: PrivacyBudget) -> None:
    """Raise unless the ledger reserves this very grant and its charges are within the budget. Takes
    seconds."""
    with _ledger_failures():
        chain = book.read()
        if not chain.has_reserved(grant):
            raise ledger.LedgerRefused(f"run {grant.run_key} has no reservation with this grant")
        epsilon = accountant.epsilon(chain.charged(), float(budget.delta))
        if epsilon > float(budget.epsilon) * (1 + EPSILON_TOLERANCE):
            raise ledger.BudgetExceeded(f"the ledger charges epsilon {epsilon:.2f} of {budget.epsilon}")


def launch(book: ledger.Ledger, grant: Grant, receipt_key: str) -> None:
    """Append the launch, once for all attempts. Raise if the reservation was released meanwhile, or an
    earlier attempt had another key."""
    with _ledger_failures():
        book.launch(grant, receipt_key)


@contextmanager
def _ledger_failures() -> Iterator[None]:
    try:
        with store_failures(missing=Reason.LEDGER_REFUSED, damaged=Reason.LEDGER_REFUSED):
            yield
    except (ledger.LedgerRefused, ledger.LedgerBroken, ledger.BudgetExceeded) as error:
        raise StageFailure(Reason.LEDGER_REFUSED, str(error)) from error


def _objections(task: TrainTask, client: FederatedClient, receipt_key: str, now: datetime) -> Iterator[str]:
    """What the owner's object has against the task, the gravest first."""
    spec, grant = client.spec, task.grant
    if client.metadata.deletion_timestamp is not None:
        yield "the FederatedClient is being deleted"
    if spec.suspend:
        yield "the owner has suspended it"
    if spec.consent.expires <= now:
        yield f"consent expired at {spec.consent.expires.isoformat()}"
    yield from _distrust(task, spec, receipt_key)
    yield from _differences(task, spec)
    if float(grant.epsilon) > float(spec.privacy.max_round_epsilon):
        yield f"epsilon {grant.epsilon} is above maxRoundEpsilon {spec.privacy.max_round_epsilon}"
    if float(grant.delta) > float(spec.privacy.budget.delta):
        yield f"delta {grant.delta} is above the budget's {spec.privacy.budget.delta}"
    if grant.mechanism.num_examples > spec.data.num_examples:
        yield f"the grant counts on more examples than the {spec.data.num_examples} declared"


def _distrust(task: TrainTask, spec: FederatedClientSpec, receipt_key: str) -> Iterator[str]:
    """Where hub or key are not those that the owner names."""
    namespace, signer = task.grant.hub_namespace, task.grant_signature.key
    hub = next((hub for hub in spec.consent.hubs if hub.namespace == namespace), None)
    if hub is None:
        yield f"the owner does not consent to hub {namespace}"
    elif hub.public_key not in (None, signer):
        yield f"the grant is signed with {signer}, and spec.consent.hubs trusts only {hub.public_key}"
    if spec.privacy.receipt_key not in (None, receipt_key):
        yield (
            f"spec.privacy.receiptKey is {spec.privacy.receipt_key}, and the Secret "
            f"{spec.privacy.noise_key_secret} gives {receipt_key}: name that one, or restore the Secret"
        )


def _differences(task: TrainTask, spec: FederatedClientSpec) -> Iterator[str]:
    """Where the task names other data, another ledger or another store than the owner's object does."""
    if task.data != spec.data or task.grant.data_name != spec.data.name:
        yield "the task's data is not that of spec.data: it changed since the round was planned"
    if task.ledger_uri != spec.privacy.ledger_uri:
        yield "the task's ledger is not that of spec.privacy.ledgerUri"
    if (task.store.endpoint, task.store.region) != (spec.store.endpoint, spec.store.region):
        yield "the task's store is not that of spec.store"


def _contradictions(task: TrainTask) -> Iterator[str]:
    """Where the task and its grant contradict each other, or the grant itself."""
    grant, mechanism = task.grant, task.grant.mechanism
    if task.base_model.digest != grant.base_model_digest:
        yield "the task's base model is not the one of its grant"
    if task.training.max_steps != mechanism.steps:
        yield f"{task.training.max_steps} steps are asked for, {mechanism.steps} are granted"
    if task.training.expected_batch_size != mechanism.expected_batch_size:
        yield "training.expectedBatchSize is not the one of the grant"
    if computation_digest(task.method, task.training, task.task) != grant.computation:
        # Their noise would be another: a second release for the price of one.
        yield "the task's method, training or task kind is not the one of the grant"
    layout = Layout(bucket_and_key(grant.delta_uri)[0])
    due = layout.delta(grant.client, grant.run_key), layout.delta_manifest(grant.client, grant.run_key)
    if (task.delta_uri, task.manifest_uri) != due or grant.delta_uri != due[0]:
        # In another place a second delta of the same run could be published.
        yield f"the delta must be written to {due[0]} and its manifest beside it"
    if mechanism.expected_batch_size > mechanism.num_examples:
        yield "the grant's expected batch is larger than its number of examples"
    if mechanism.batch_cap != batch_cap(mechanism.num_examples, mechanism.expected_batch_size):
        yield "the grant's batch cap is not the one that its cost is computed with"
    cost = accountant.epsilon([mechanism], float(grant.delta))
    if cost > float(grant.epsilon) * (1 + EPSILON_TOLERANCE):
        yield f"the granted mechanism costs epsilon {cost:.3f}, not {grant.epsilon}"

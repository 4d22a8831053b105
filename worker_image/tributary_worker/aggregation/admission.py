"""Which deltas are used: those of the cohort without the ones that are excluded, by name and for good.

An exclusion is a create-only record, so that every pod and every restart works with the same deltas.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tributary_api.base import canonical_json, sha256_of
from tributary_api.failures import Reason
from tributary_api.meta import NamespacedName
from tributary_api.round import ClientFailure
from tributary_api.tasks import AggregateTask
from tributary_store.errors import ObjectExists
from tributary_store.keys import AggregateRecords
from tributary_store.objects import Objects
from tributary_worker.aggregation.deltas import (
    Delta,
    DeltaRejectedError,
    ExpectedTensor,
    Rejection,
    inspect,
)
from tributary_worker.failures import StageFailure

NORM_FACTOR_MAX = 10.0
"""A stated norm may be this many times the cohort's median. Noise, which is most of a private delta, has
nearly the same norm everywhere; what is ten times as long is a mistake or an attack."""
NORM_TOLERANCE = 1e-2
"""Relative; a client may have added its squares up in another order and precision."""
NAMED_IN_MESSAGE_MAX = 5
COHORT_KEY_HEX_DIGITS = 40
"""Shorter than a digest, so that nobody takes one for the other."""


@dataclass(frozen=True, slots=True)
class Cohort:
    """The deltas that are used, in the order of the clients' names, and those that are not."""

    deltas: Sequence[Delta]
    excluded: Sequence[ClientFailure]

    def key(self, task: AggregateTask) -> str:
        """Equal for equal inputs, whichever pod looks: what the result's bytes depend on."""
        aggregation = task.aggregation.to_json_object()
        aggregation.pop("parallelism", None)
        parts: list[Any] = [task.run_key, task.base_model.digest, task.method.to_json_object(), aggregation]
        parts += [[str(delta.client), delta.weight, delta.fingerprint] for delta in self.deltas]
        return sha256_of(canonical_json(parts)).removeprefix("sha256:")[:COHORT_KEY_HEX_DIGITS]


@dataclass(slots=True)
class Admission:
    """Decides about the deltas of a task; each is inspected once."""

    task: AggregateTask
    store: Objects
    expected: Mapping[str, ExpectedTensor]
    log: Any
    _inspected: dict[NamespacedName, Delta] = field(default_factory=dict[NamespacedName, Delta])

    @property
    def records(self) -> AggregateRecords:
        return AggregateRecords.beside(self.task.manifest_uri)

    def cohort(self) -> Cohort:
        """The deltas as the records and their manifests say. StageFailure if the quorum is not met."""
        excluded = self.exclusions()
        while found := self._faults(excluded):
            for error in found:
                self.exclude(error)
            excluded = self.exclusions()
        cohort = Cohort(
            [self._inspected[d.client] for d in self._in_order() if str(d.client) not in excluded],
            [excluded[client] for client in sorted(excluded)],
        )
        require_quorum(self.task, cohort)
        return cohort

    def exclusions(self) -> dict[str, ClientFailure]:
        """What is recorded, by client."""
        found = [
            ClientFailure.model_validate_json(self.store.get(info.uri))
            for info in self.store.list(self.records.exclusions)
        ]
        return {failure.client: failure for failure in found}

    def exclude(self, error: DeltaRejectedError) -> None:
        """Record why a delta is not used; what another pod has recorded before stays."""
        client = str(error.client)
        self.log.warning("delta excluded", client=client, reason=error.reason, message=str(error))
        failure = ClientFailure(client=client, reason=error.reason, message=str(error)[:1024])
        try:
            self.store.put_new(self.records.exclusion(error.client), failure.canonical_json(), retain=True)
        except ObjectExists:
            self.log.info("excluded already", client=client)

    def _in_order(self) -> list[Any]:
        # Sums of floats depend on the order, so it must not depend on the task's.
        return sorted(self.task.deltas, key=lambda delta: str(delta.client))

    def _faults(self, excluded: Mapping[str, ClientFailure]) -> list[DeltaRejectedError]:
        """What is wrong with the deltas that are not excluded."""
        faults = []
        usable = [delta for delta in self._in_order() if str(delta.client) not in excluded]
        for delta in usable:
            try:
                if delta.client not in self._inspected:
                    self._inspected[delta.client] = inspect(self.store, self.task, delta, self.expected)
            except DeltaRejectedError as error:
                faults.append(error)
        return faults or too_large([self._inspected[delta.client] for delta in usable])


def too_large(deltas: Sequence[Delta]) -> list[DeltaRejectedError]:
    """Deltas whose stated norm is far above the cohort's (lower) median."""
    if not deltas:
        return []
    median = sorted(delta.manifest.l2_norm for delta in deltas)[(len(deltas) - 1) // 2]
    limit = NORM_FACTOR_MAX * median
    return [
        DeltaRejectedError(
            delta.client,
            Rejection.TOO_LARGE,
            f"its norm {delta.manifest.l2_norm:.4g} is more than {NORM_FACTOR_MAX:g} times the cohort's "
            f"median of {median:.4g}: check the client's training",
        )
        for delta in deltas
        if median > 0 and delta.manifest.l2_norm > limit
    ]


def check_norms(deltas: Sequence[Delta], squares: Sequence[float]) -> None:
    """Compare what was stated with the sums of squares that were found. DeltaRejectedError names who lied."""
    for delta, found in zip(deltas, squares, strict=True):
        stated = delta.manifest.l2_norm
        if not math.isclose(math.sqrt(found), stated, rel_tol=NORM_TOLERANCE, abs_tol=1e-12):
            message = f"its norm is {math.sqrt(found):.6g}, and its manifest states {stated:.6g}"
            raise DeltaRejectedError(delta.client, Rejection.NORM_MISMATCH, message)


def require_quorum(task: AggregateTask, cohort: Cohort) -> None:
    if len(cohort.deltas) >= task.quorum:
        return
    named = [f"{f.client} ({f.reason})" for f in cohort.excluded[:NAMED_IN_MESSAGE_MAX]]
    raise StageFailure(
        Reason.QUORUM_BROKEN,
        f"{len(cohort.deltas)} usable deltas of {len(task.deltas)}, the quorum is {task.quorum}; "
        f"excluded: {', '.join(named) or 'none'}; "
        "start another round with other clients or a smaller minAvailable",
    )

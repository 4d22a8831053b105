"""One pod's part of an aggregation: its shards of the new model, each recorded when it is done.

What is recorded is not done again, whichever pod did it. Before the shards, where the strategy's weights
depend on the products of the deltas, come those, in the same parts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np

from tributary_api.base import ApiModel
from tributary_api.failures import Reason
from tributary_api.records import GramRecord, OptimizerState, ShardRecord
from tributary_store import keys
from tributary_store.errors import ObjectExists, ObjectMissing
from tributary_worker.aggregation.admission import Admission, Cohort, check_norms
from tributary_worker.aggregation.making import Maker, total_squares
from tributary_worker.aggregation.numbers import Array
from tributary_worker.aggregation.progress import Progress
from tributary_worker.aggregation.shards import Shard
from tributary_worker.aggregation.strategies import strategy_for
from tributary_worker.aggregation.values import Copies
from tributary_worker.failures import StageFailure

RecordT = TypeVar("RecordT", bound=ApiModel)


@dataclass(frozen=True, slots=True)
class Pod:
    """This process among those that share the work."""

    index: int = 0
    count: int = 1


ALONE = Pod()


class CohortChangedError(Exception):
    """Another pod has excluded a delta: everything starts again without it."""


@dataclass(frozen=True, slots=True)
class Work:
    """The aggregation of one set of deltas, as far as this pod has to do with it."""

    key: str
    cohort: Cohort
    admission: Admission
    maker: Maker
    shards: Sequence[Shard]
    pod: Pod
    progress: Progress
    earlier_state: OptimizerState | None

    @property
    def model_uri(self) -> str:
        return keys.aggregated_model(self.maker.task.models_uri, self.key)

    def run(self) -> list[ShardRecord]:
        """Make this pod's shards; gives the records of all, once they are there.

        DeltaRejectedError: a delta cannot be used. CohortChangedError: another pod found one.
        """
        if self.maker.plan.is_dense:
            return self._made(self.maker)
        copies = self._copied()
        try:
            return self._made(replace(self.maker, copies=copies))
        finally:
            copies.close()

    def wait_until(self, is_there: Callable[[], bool], what: str) -> None:
        """Look for what other pods do. CohortChangedError if they exclude a delta meanwhile."""
        tuning = self.maker.tuning
        deadline = time.monotonic() + tuning.wait_seconds_max
        while not is_there():
            if self.admission.exclusions().keys() != {failure.client for failure in self.cohort.excluded}:
                raise CohortChangedError
            if time.monotonic() > deadline:
                message = f"{what} did not appear: do all pods run? If not, lower aggregation.parallelism"
                raise StageFailure(Reason.RENDEZVOUS_TIMED_OUT, message)
            time.sleep(tuning.poll_seconds)

    def _copied(self) -> Copies:
        deltas, expected = self.cohort.deltas, self.maker.plan.expected()
        maker = self.maker
        copies = Copies.of(maker.store, deltas, maker.directory, self.progress.count, maker.tuning.ahead)
        try:
            check_norms(deltas, [copies.check(client, expected) for client in range(len(deltas))])
        except BaseException:
            copies.close()
            raise
        return copies

    def _made(self, maker: Maker) -> list[ShardRecord]:
        weights = self._weights(maker)
        uris = [self.admission.records.shard(self.key, n) for n in range(len(self.shards))]
        for n in self._mine():
            self._once(uris[n], ShardRecord, partial(self._shard, maker, self.shards[n], weights))
        found = [self._wait_for(uri, ShardRecord) for uri in uris]
        if maker.plan.is_dense and not strategy_for(maker.task.aggregation).needs_gram:
            check_norms(self.cohort.deltas, total_squares([record.squares for record in found]))
        return found

    def _shard(self, maker: Maker, shard: Shard, weights: Array) -> ShardRecord:
        before = self.progress.bytes_done
        made = maker.shard(shard, weights, self.model_uri, self.earlier_state)
        read = self.progress.bytes_done - before
        return ShardRecord(file=made.file, state=made.state, squares=made.squares, bytes_read=read)

    def _weights(self, maker: Maker) -> Array:
        declared = np.array([delta.weight for delta in self.cohort.deltas])
        strategy = strategy_for(maker.task.aggregation)
        if not strategy.needs_gram:
            return strategy.weights(declared, None)
        uris = [self.admission.records.gram(self.key, n) for n in range(len(self.shards))]
        for n in self._mine():
            self._once(uris[n], GramRecord, partial(self._gram, maker, self.shards[n]))
        gram = np.sum([self._wait_for(uri, GramRecord).products for uri in uris], axis=0)
        if maker.plan.is_dense:
            check_norms(self.cohort.deltas, np.diag(gram).tolist())
        return strategy.weights(declared, gram)

    def _gram(self, maker: Maker, shard: Shard) -> GramRecord:
        before = self.progress.bytes_done
        products = maker.gram(shard).tolist()
        return GramRecord(products=products, bytes_read=self.progress.bytes_done - before)

    def _mine(self) -> range:
        return range(self.pod.index, len(self.shards), self.pod.count)

    def _wait_for(self, uri: str, kind: type[RecordT]) -> RecordT:
        store = self.maker.store
        self.wait_until(lambda: store.head(uri) is not None, uri)
        return kind.model_validate_json(store.get(uri))

    def _once(self, uri: str, kind: type[RecordT], make: Callable[[], RecordT]) -> RecordT:
        """The record at `uri`, made now if nobody has made it."""
        store = self.maker.store
        try:
            return kind.model_validate_json(store.get(uri))
        except ObjectMissing:
            record = make()
        try:
            store.put_new(uri, record.canonical_json(), retain=True)
        except ObjectExists:
            # Another attempt was faster; what it says of its own reading may differ, the weights do not.
            record = kind.model_validate_json(store.get(uri))
        self.progress.write_mark()
        return record


def bytes_to_read(maker: Maker, shards: Sequence[Shard]) -> int:
    """What a pod with these shards reads, but for headers."""
    base = sum(shard.span[1] - shard.span[0] for shard in shards)
    if not maker.plan.is_dense:
        return base + sum(delta.manifest.file.size for delta in maker.deltas)
    names = [variable.name for shard in shards for variable in maker.plan.variables(shard.tensors)]
    of_deltas = sum(part.length for d in maker.deltas for name in names for part in d.tensors[name].parts)
    passes = 2 if strategy_for(maker.task.aggregation).needs_gram else 1
    return base + passes * of_deltas

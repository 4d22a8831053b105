"""Making one shard of the new model: values of the clients in, bytes of a safetensors file out.

values in blocks ─► combination ─► changes ─► (server optimizer) ─► base model's bytes + changes ─► upload
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tributary_api.records import FileDigest, OptimizerState
from tributary_api.tasks import AggregateTask
from tributary_store.bundle import file_uri
from tributary_store.objects import Objects, Upload
from tributary_worker.aggregation import combine
from tributary_worker.aggregation.base import BaseModel
from tributary_worker.aggregation.blocks import BLOCK_ELEMENTS_MAX, Block, Variable, cut
from tributary_worker.aggregation.changes import Change
from tributary_worker.aggregation.deltas import Delta
from tributary_worker.aggregation.merge import Merge
from tributary_worker.aggregation.methods import Combined, LocalValues, LoraPlan, MethodPlan
from tributary_worker.aggregation.numbers import Array
from tributary_worker.aggregation.optimizing import Memory, open_memory
from tributary_worker.aggregation.reader import CheckedReader, Count, SequentialReader
from tributary_worker.aggregation.scratch import discard_unfinished
from tributary_worker.aggregation.shards import SHARD_BYTES_MAX, Shard
from tributary_worker.aggregation.strategies import server_optimizer_for, strategy_for
from tributary_worker.aggregation.values import Copies, Streamed, Values, chunk_boundary

LOCAL_BLOCK_ELEMENTS = 1 << 20
"""Of values that are computed from local copies: a block is as cheap as many."""
BASE_AHEAD = 1


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the work is cut up. Nothing here changes a weight."""

    block_elements: int = BLOCK_ELEMENTS_MAX
    ahead: int = 4
    """Blocks of one client that are fetched before they are needed."""
    shard_bytes: int = SHARD_BYTES_MAX
    poll_seconds: float = 2.0
    wait_seconds_max: float = 6 * 3600.0
    """For other pods. The Job's own deadline is usually earlier."""


DEFAULT = Tuning()


@dataclass(frozen=True, slots=True)
class MadeShard:
    file: FileDigest
    state: list[FileDigest]
    squares: list[float]


@dataclass(frozen=True, slots=True)
class Maker:
    """What making a shard takes."""

    task: AggregateTask
    store: Objects
    base: BaseModel
    plan: MethodPlan
    deltas: Sequence[Delta]
    copies: Copies | None
    """Of the deltas, unless they are streamed."""
    tuning: Tuning
    directory: Path
    count: Count

    def gram(self, shard: Shard) -> Array:
        """<dᵢ, dⱼ> over the shard's variables, (clients, clients)."""
        with self._values(shard) as (values, variables):
            # Not cut as the tuning says: the last bits of these sums depend on where blocks end.
            blocks = self._blocks(variables, BLOCK_ELEMENTS_MAX)
            everybody = combine.Cohort(values, range(len(self.deltas)), blocks, self.tuning.ahead)
            return combine.gram_matrix(everybody, self.directory)

    def shard(
        self, shard: Shard, weights: Array, model_uri: str, earlier: OptimizerState | None
    ) -> MadeShard:
        """Upload the shard, and what the server optimizer remembers of it."""
        uri = f"{model_uri}/{shard.path}"
        discard_unfinished(self.store, uri)
        output, memory = self.store.begin(uri), self._memory(shard, model_uri, earlier)
        try:
            with self._values(shard) as (values, variables):
                combined = self._combined(values, variables, weights)
                self._merge(shard, self.plan.changes(combined), memory, output)
                squares = list(values.squares) if isinstance(values, Streamed) else []
            state = memory.finish(shard.path) if memory is not None else []
            return MadeShard(output.finish(shard.path), state, squares)
        except BaseException:
            output.abort()
            if memory is not None:
                memory.abort()
            raise

    def _merge(self, shard: Shard, changes: Iterator[Change], memory: Memory | None, output: Upload) -> None:
        reader = CheckedReader(
            self.store, file_uri(self.base.ref, shard.file.digest.path), shard.file.digest, self.count
        )
        base = SequentialReader(reader, *shard.span, ahead=BASE_AHEAD)
        steps = memory.steps(changes) if memory is not None else changes
        Merge(shard, base, output.write).run(steps, self.plan.is_trained)

    def _memory(self, shard: Shard, model_uri: str, earlier: OptimizerState | None) -> Memory | None:
        optimizer = server_optimizer_for(self.task.aggregation)
        if optimizer is None:
            return None
        return open_memory(
            self.store,
            optimizer,
            (self.task.base_model, earlier) if earlier is not None else None,
            model_uri=model_uri,
            path=shard.path,
            tensors=[info for info in shard.tensors if self.plan.is_trained(info.name)],
            count=self.count,
        )

    def _combined(self, values: Values, variables: Sequence[Variable], weights: Array) -> Combined:
        strategy = strategy_for(self.task.aggregation)
        blocks = self._blocks(variables, self.tuning.block_elements)
        if strategy.is_linear:
            counted = [client for client, weight in enumerate(weights) if weight]
            cohort = combine.Cohort(values, counted, blocks, self.tuning.ahead)
            return combine.weighted_sums(cohort, weights)
        cohort = combine.Cohort(values, range(len(weights)), blocks, self.tuning.ahead)
        return combine.combinations(cohort, lambda rows: strategy.combine(rows, weights), self.directory)

    def _blocks(self, variables: Sequence[Variable], elements_max: int) -> list[Block]:
        if not self.plan.is_dense:
            limit = min(elements_max, LOCAL_BLOCK_ELEMENTS)
            return list(cut(variables, limit, lambda _name, start: start + limit))
        # Of the smallest file a chunk has the most elements: the others' chunks are used up with it.
        densest = min(self.deltas, key=lambda delta: delta.manifest.file.size)
        return list(cut(variables, elements_max, chunk_boundary(densest)))

    @contextmanager
    def _values(self, shard: Shard) -> Iterator[tuple[Values, list[Variable]]]:
        variables = self.plan.variables(shard.tensors)
        if isinstance(self.plan, LoraPlan) and self.copies is not None:
            yield LocalValues(self.plan, self.copies), variables
            return
        names = [variable.name for variable in variables]
        streamed = Streamed.of(self.store, self.deltas, names, self.directory, self.count)
        try:
            yield streamed, variables
        finally:
            streamed.close()


def total_squares(of_shards: Sequence[Sequence[float]]) -> list[float]:
    """By client, over all shards."""
    return [float(total) for total in np.sum(np.array(of_shards), axis=0)]

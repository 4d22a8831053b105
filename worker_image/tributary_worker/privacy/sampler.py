"""Truncated Poisson sampling: which records take part in a step, and which slot of which rank computes them.

Sampler, neighbouring relation and accountant belong together (docs/privacy.md: the same noise means epsilon 3
with this sampler and 20 with a shuffled loader), so the probabilities come from the accountant's own
mechanism.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tributary_api.records import MechanismSpec
from tributary_worker.privacy.keystream import Keystream

EMPTY = -1
"""A slot without a record. It is computed like any other and weighs nothing."""

STREAMS_PER_STEP = 2
WORD_VALUES = 2**64


class PoissonSampler:
    """Draws each of N records with probability q, independently in every step, from a key that all ranks
    share."""

    def __init__(self, mechanism: MechanismSpec, key: bytes) -> None:
        self._mechanism = mechanism
        self._keystream = Keystream(key)
        self._threshold = np.uint64(min(round(mechanism.sampling_probability * WORD_VALUES), WORD_VALUES - 1))

    def records(self, step: int) -> npt.NDArray[np.int64]:
        """Indices of the records of a step, ascending, never more than the batch cap.

        Beyond the cap a uniformly random subset stays: those with the smallest words of a second stream.
        """
        selected = np.flatnonzero(self._words(step, 0) < self._threshold)
        if len(selected) > self._mechanism.batch_cap:
            rank_of = np.argsort(self._words(step, 1)[selected], kind="stable")
            selected = np.sort(selected[rank_of[: self._mechanism.batch_cap]])
        return selected.astype(np.int64)

    def micro_batches(
        self, step: int, rank: int, world_size: int, micro_batch_size: int
    ) -> npt.NDArray[np.int64]:
        """One rank's share of a step: (micro-batches, micro_batch_size) record indices, `EMPTY` in unused
        slots.

        The shape is a function of public numbers only: neither time nor traffic tells how many records were
        drawn.
        """
        per_rank = micro_batches_per_rank(self._mechanism.batch_cap, world_size, micro_batch_size)
        slots = np.full(world_size * per_rank * micro_batch_size, EMPTY, dtype=np.int64)
        records = self.records(step)
        slots[: len(records)] = records
        return slots.reshape(world_size, per_rank, micro_batch_size)[rank]

    def _words(self, step: int, purpose: int) -> npt.NDArray[np.uint64]:
        return self._keystream.words(STREAMS_PER_STEP * step + purpose, 0, self._mechanism.num_examples)


def micro_batches_per_rank(batch_cap: int, world_size: int, micro_batch_size: int) -> int:
    return -(-batch_cap // (world_size * micro_batch_size))

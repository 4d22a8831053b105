"""Writing one file of the new model: the base model's bytes, with the round's changes added on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from tributary_api.failures import Reason
from tributary_store.digests import spans
from tributary_store.objects import Bytes
from tributary_store.tensors import DTYPE_BYTES, TensorInfo
from tributary_worker.aggregation.changes import Change
from tributary_worker.aggregation.numbers import decode, encode
from tributary_worker.aggregation.reader import SequentialReader
from tributary_worker.aggregation.shards import Shard
from tributary_worker.failures import StageFailure

PART_ELEMENTS = 1 << 18
"""Elements of a weight that are worked on at a time."""
COPY_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class Merge:
    """Makes the bytes of one shard out of the base model's and the changes."""

    shard: Shard
    base: SequentialReader
    write: Callable[[Bytes], None]

    def run(self, changes: Iterator[Change], is_trained: Callable[[str], bool]) -> None:
        """Write header and tensors; every trained tensor takes its changes, and none is left over."""
        self.write(self.shard.header)
        for info in self.shard.tensors:
            if is_trained(info.name):
                self._change(info, changes)
            else:
                for _, length in spans(info.length, COPY_BYTES):
                    self.write(self.base.read(length))

    def _change(self, info: TensorInfo, changes: Iterator[Change]) -> None:
        done = 0
        while done < info.elements:
            change = next(changes)
            if (change.tensor, change.start) != (info.name, done):
                raise AssertionError(
                    f"change of {change.tensor} at {change.start}, due: {info.name} at {done}"
                )
            self._add(info, change)
            done += len(change.values)

    def _add(self, info: TensorInfo, change: Change) -> None:
        size = DTYPE_BYTES[info.dtype]
        for start in range(0, len(change.values), PART_ELEMENTS):
            values = change.values[start : start + PART_ELEMENTS]
            new = encode(decode(self.base.read(len(values) * size), info.dtype) + values, info.dtype)
            if not np.isfinite(decode(new, info.dtype)).all():
                raise StageFailure(
                    Reason.NON_FINITE_DELTA,
                    f"the new {info.name} leaves the range of {info.dtype}: lower training.learningRate",
                )
            self.write(new)

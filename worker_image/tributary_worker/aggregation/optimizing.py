"""The server optimizer's memory: float32 tensors beside the model, read and written while the weights are.

A round that starts from a model with a memory of the same optimizer goes on with it; any other starts anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import ValidationError

from tributary_api.base import canonical_json
from tributary_api.records import FileDigest, OptimizerState
from tributary_api.shared import ModelRef
from tributary_api.tasks import AggregateTask
from tributary_store import keys
from tributary_store.errors import ObjectDamaged
from tributary_store.objects import Objects, Upload
from tributary_store.tensors import TensorInfo, encode_header
from tributary_worker.aggregation.changes import Change
from tributary_worker.aggregation.numbers import Array
from tributary_worker.aggregation.reader import CheckedReader, Count, SequentialReader
from tributary_worker.aggregation.scratch import discard_unfinished
from tributary_worker.aggregation.strategies import ServerOptimizer

STATE_MANIFEST = "state.json"
VALUE_BYTES = 4
PART_ELEMENTS = 1 << 18


def settings_of(task: AggregateTask) -> str:
    """By which a memory is recognised: equal optimizers of equal weights give equal text."""
    parts = (task.aggregation.server_optimizer, task.method)
    return canonical_json([part.to_json_object() for part in parts if part is not None]).decode()


def state_uri(model_uri: str, path: str, slot: str) -> str:
    """Where what `slot` holds for one file of a model lies."""
    return f"{keys.optimizer_state(model_uri)}{slot}/{path}"


def manifest_uri(model_uri: str) -> str:
    return keys.optimizer_state(model_uri) + STATE_MANIFEST


def earlier_state(store: Objects, task: AggregateTask) -> OptimizerState | None:
    """The memory of the round that made the base model, if this round's optimizer can go on with it."""
    uri = manifest_uri(task.base_model.uri)
    if task.aggregation.server_optimizer is None or store.head(uri) is None:
        return None
    try:
        state = OptimizerState.model_validate_json(store.get(uri))
    except ValidationError as error:
        raise ObjectDamaged(f"{uri} is not an optimizer's state: restore it from a copy") from error
    is_ours = state.model_digest == task.base_model.digest and state.optimizer == settings_of(task)
    return state if is_ours else None


@dataclass(slots=True)
class Slot:
    """One tensor that the optimizer keeps for each weight: its old values, and where the new ones go."""

    initial: float
    old: SequentialReader | None
    new: Upload

    def read(self, elements: int) -> Array:
        if self.old is None:
            return np.full(elements, self.initial)
        return np.frombuffer(self.old.read(elements * VALUE_BYTES), "<f4").astype(np.float64)


@dataclass(frozen=True, slots=True)
class Memory:
    """The optimizer's memory of one shard, on its way from the old model's to the new one's."""

    optimizer: ServerOptimizer
    slots: Sequence[Slot]

    def steps(self, changes: Iterator[Change]) -> Iterator[Change]:
        """The steps that the optimizer takes for these changes."""
        for change in changes:
            for start in range(0, len(change.values), PART_ELEMENTS):
                values = change.values[start : start + PART_ELEMENTS]
                step, state = self.optimizer.step(values, [slot.read(len(values)) for slot in self.slots])
                for slot, kept in zip(self.slots, state, strict=True):
                    slot.new.write(kept.astype("<f4").tobytes())
                yield Change(change.tensor, change.start + start, step)

    def finish(self, path: str) -> list[FileDigest]:
        return [slot.new.finish(path) for slot in self.slots]

    def abort(self) -> None:
        for slot in self.slots:
            slot.new.abort()


def open_memory(
    store: Objects,
    optimizer: ServerOptimizer,
    earlier: tuple[ModelRef, OptimizerState] | None,
    *,
    model_uri: str,
    path: str,
    tensors: Sequence[TensorInfo],
    count: Count,
) -> Memory:
    """The memory of the shard `path`, whose trained tensors are `tensors`."""
    header = encode_header({info.name: ("F32", info.shape) for info in tensors}, {})
    slots = []
    for name, initial in optimizer.slots.items():
        old = _old_values(store, earlier, path, name, header_bytes=len(header), count=count)
        uri = state_uri(model_uri, path, name)
        discard_unfinished(store, uri)
        new = store.begin(uri)
        new.write(header)
        slots.append(Slot(initial, old, new))
    return Memory(optimizer, slots)


def _old_values(
    store: Objects,
    earlier: tuple[ModelRef, OptimizerState] | None,
    path: str,
    slot: str,
    *,
    header_bytes: int,
    count: Count,
) -> SequentialReader | None:
    if earlier is None:
        return None
    model, state = earlier
    digest = state.files[path][slot]
    reader = CheckedReader(store, state_uri(model.uri, path, slot), digest, count)
    return SequentialReader(reader, header_bytes, digest.size, ahead=1)

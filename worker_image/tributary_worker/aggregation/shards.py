"""The files of the new model: the units of parallel work, of resumption and of what is written at a time.

They depend on the base model alone. A model of several files keeps them; a model of one large file is divided
between tensors, with the index that transformers reads ("Sharded checkpoints" in its documentation).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from tributary_api.base import canonical_json
from tributary_store.bundle_files import WEIGHTS_FILE
from tributary_store.tensors import TensorInfo, encode_header
from tributary_worker.aggregation.base import BaseModel, WeightFile

SHARD_BYTES_MAX = 1 << 30
"""Of a file that is divided. A minute of work, so that a restart repeats little and pods are kept busy."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the new model: consecutive tensors of one file of the base model."""

    path: str
    header: bytes
    file: WeightFile
    tensors: tuple[TensorInfo, ...]

    @property
    def span(self) -> tuple[int, int]:
        """First and last byte (exclusive) of the tensors in the base model's file."""
        if not self.tensors:
            return self.file.digest.size, self.file.digest.size
        return self.tensors[0].start, self.tensors[-1].start + self.tensors[-1].length


def shards_of(base: BaseModel, bytes_max: int = SHARD_BYTES_MAX) -> list[Shard]:
    file = base.files[0]
    if len(base.files) > 1 or file.digest.size <= bytes_max:
        return [Shard(f.digest.path, f.header_bytes, f, tuple(f.header.tensors.values())) for f in base.files]
    groups = list(_groups(list(file.header.tensors.values()), bytes_max))
    stem, suffix = WEIGHTS_FILE.rsplit(".", 1)
    return [
        Shard(f"{stem}-{n:05d}-of-{len(groups):05d}.{suffix}", _header(group, file), file, tuple(group))
        for n, group in enumerate(groups, start=1)
    ]


def index_of(shards: Sequence[Shard]) -> bytes:
    """The JSON that says in which file each tensor is."""
    places = {info.name: shard.path for shard in shards for info in shard.tensors}
    total = sum(info.length for shard in shards for info in shard.tensors)
    return canonical_json({"metadata": {"total_size": total}, "weight_map": places})


def _groups(tensors: Sequence[TensorInfo], bytes_max: int) -> Iterator[list[TensorInfo]]:
    group: list[TensorInfo] = []
    for info in tensors:
        if group and info.start + info.length - group[0].start > bytes_max:
            yield group
            group = []
        group.append(info)
    if group:
        yield group


def _header(tensors: Sequence[TensorInfo], file: WeightFile) -> bytes:
    shapes: Mapping[str, tuple[str, tuple[int, ...]]] = {
        info.name: (info.dtype, info.shape) for info in tensors
    }
    return encode_header(shapes, file.header.metadata)

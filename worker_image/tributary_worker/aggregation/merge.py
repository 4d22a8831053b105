"""Writing the new model: every weight of the base model, changed or not, from the store to a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tributary_api.failures import Reason
from tributary_store.digests import spans
from tributary_store.tensors import DTYPE_BYTES, TensorInfo
from tributary_worker.aggregation.base import BaseModel, WeightFile
from tributary_worker.aggregation.changes import Change
from tributary_worker.aggregation.deltas import Delta
from tributary_worker.aggregation.methods import MethodPlan, rows_and_columns
from tributary_worker.aggregation.numbers import Array, decode, encode
from tributary_worker.failures import StageFailure

BLOCK_ELEMENTS = 1 << 21
"""Elements of a weight that are in memory at a time: 16 MiB in float64, besides a few copies."""


def write_weights(
    base: BaseModel,
    plan: MethodPlan,
    deltas: Sequence[Delta],
    directory: Path,
    report: Callable[[int, int], None],
) -> None:
    """Write the new weights under the base model's file names. `report(done, total)` counts tensors."""
    total, done = len(base.tensors), 0
    for file in base.files:
        with (directory / file.digest.path).open("wb") as output:
            output.write(_header_bytes(file))
            for info in file.header.tensors.values():
                change = plan.change(info.name, deltas)
                _write_tensor(file, info, change, output)
                done += 1
                report(done, total)


def _header_bytes(file: WeightFile) -> bytes:
    """The base file's own header: names, types and shapes stay."""
    start = min((info.start for info in file.header.tensors.values()), default=file.digest.size)
    return file.reader.read(0, start)


def _write_tensor(file: WeightFile, info: TensorInfo, change: Change | None, output: BinaryIO) -> None:
    if change is None:
        for start, length in spans(info.length):
            output.write(file.reader.read(info.start + start, length))
        return
    rows, columns = rows_and_columns(info)
    row_bytes = columns * DTYPE_BYTES[info.dtype]
    block_rows = max(1, BLOCK_ELEMENTS // max(1, columns))
    for start in range(0, rows, block_rows):
        stop = min(start + block_rows, rows)
        old = file.reader.read(info.start + start * row_bytes, (stop - start) * row_bytes)
        new = decode(old, info.dtype).reshape(-1, columns) + change.rows(start, stop)
        output.write(_encoded(new, info))


def _encoded(values: Array, info: TensorInfo) -> bytes:
    data = encode(values, info.dtype)
    if not np.isfinite(decode(data, info.dtype)).all():
        raise StageFailure(
            Reason.NON_FINITE_DELTA,
            f"the new {info.name} leaves the range of {info.dtype}: lower training.learningRate",
        )
    return data

"""The norm that a client states about its delta: of what a reader decodes, so after noise and encoding."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

from tributary_api.aggregation import DeltaEncoding
from tributary_api.round import Method
from tributary_store.digests import read_span
from tributary_store.tensors import TensorInfo, read_header
from tributary_worker import lora_names
from tributary_worker.aggregation.blocks import Segment
from tributary_worker.aggregation.encodings import ENCODINGS, SCALES_SUFFIX, StoredTensor, stored_tensor
from tributary_worker.aggregation.numbers import sum_of_squares
from tributary_worker.aggregation.values import decoded

ELEMENTS_AT_A_TIME = 1 << 22


def l2_norm(path: Path, method: Method) -> float:
    """Of the trained tensors of a delta's file. Costs no ε: it is a function of what is published."""
    tensors = read_header(path.name, path.stat().st_size, partial(read_span, path)).tensors
    trained = [i for i in tensors.values() if not _is_scales(i.name) and not _is_frozen(i.name, method)]
    stored = [stored_tensor(tensors, info.name, _shape(info)) for info in trained]
    return math.sqrt(sum(_squares(path, tensor) for tensor in stored))


def _is_scales(name: str) -> bool:
    return name.endswith(SCALES_SUFFIX)


def _is_frozen(name: str, method: Method) -> bool:
    return method.lora is not None and method.lora.freeze_a and lora_names.is_factor(name, "lora_A")


def _shape(info: TensorInfo) -> tuple[int, ...]:
    """Of the elements. Int4 does not say whether the last half byte counts; it holds 0 if it does not."""
    return (2 * info.elements,) if ENCODINGS.get(info.dtype) is DeltaEncoding.INT4 else info.shape


def _squares(path: Path, stored: StoredTensor) -> float:
    total = 0.0
    for start in range(0, stored.elements, ELEMENTS_AT_A_TIME):
        segment = Segment(stored.values.name, start, min(start + ELEMENTS_AT_A_TIME, stored.elements))
        first, last = stored.span(segment.start, segment.stop)
        first_scale, last_scale = stored.scales_span(segment.start, segment.stop)
        values = read_span(path, first, last - first)
        scales = read_span(path, first_scale, last_scale - first_scale)
        total += sum(sum_of_squares(part) for part in decoded(stored, segment, values, scales))
    return total

"""Whether a delta that lies where ours is to be published is ours: written by an attempt that died meanwhile.

Whoever can write under the client's prefix could have put another one there, and the receipt would vouch for
it with the owner's signature. An earlier attempt had the same data, noise and random bits, so its delta
differs from this one by the rounding of other hardware, and by nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tributary_store.digests import read_span
from tributary_store.errors import ObjectDamaged
from tributary_store.tensors import LENGTH_BYTES, TensorHeader, TensorInfo, read_header
from tributary_worker.aggregation.encodings import ENCODINGS, SCALES_SUFFIX, EncodingError, decode
from tributary_worker.aggregation.numbers import Array

DISTANCE_MAX = 0.01
"""Of the length of the delta, which is mostly noise: rounding moves it by far less, and nobody without the
noise key comes so near."""


def is_ours(own: Path, found: Path) -> bool:
    """Whether the delta at `found` is the one at `own` but for rounding; both in the same encoding."""
    try:
        header = _header(own)
        if _head(own, header) != _head(found, _header(found)):
            return False
        distance = length = 0.0
        for ours, theirs in zip(_tensors(own, header), _tensors(found, header), strict=True):
            distance += float(np.square(theirs - ours).sum())
            length += float(np.square(ours).sum())
    except (ObjectDamaged, EncodingError):
        return False
    return distance <= DISTANCE_MAX**2 * length  # False for anything that is not a number, too


def _header(path: Path) -> TensorHeader:
    return read_header(path.name, path.stat().st_size, lambda start, length: read_span(path, start, length))


def _head(path: Path, header: TensorHeader) -> bytes:
    """Everything before the first tensor: names, types, shapes and places."""
    start = min((info.start for info in header.tensors.values()), default=LENGTH_BYTES)
    return read_span(path, 0, start)


def _tensors(path: Path, header: TensorHeader) -> Iterator[Array]:
    """Every tensor, decoded, as float64."""
    for name, info in header.tensors.items():
        if not name.endswith(SCALES_SUFFIX):
            yield _decoded(path, info, header.tensors.get(name + SCALES_SUFFIX)).astype(np.float64)


def _decoded(path: Path, info: TensorInfo, scales: TensorInfo | None) -> Array:
    encoding = ENCODINGS[info.dtype]
    elements = info.length * 2 if info.dtype == "U8" else int(np.prod(info.shape))
    return decode(encoding, _bytes(path, info), _bytes(path, scales) if scales else b"", 0, elements)


def _bytes(path: Path, info: TensorInfo) -> bytes:
    return read_span(path, info.start, info.length)

"""The file of a client's delta, in the encoding that the round asks for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

from tributary_api.round import DeltaEncoding
from tributary_store.tensors import encode_header
from tributary_worker.aggregation.encodings import (
    DTYPES,
    ELEMENTS_PER_PASS,
    SCALES_SUFFIX,
    decode,
    encode,
    encoded_shapes,
)
from tributary_worker.aggregation.numbers import Array
from tributary_worker.privacy.keystream import Keystream

METADATA = {"format": "pt"}
"""For programs that read adapters: the tensors are laid out as PyTorch's are."""


def write_delta(
    file: BinaryIO,
    trained: Mapping[str, Array],
    constant: Mapping[str, Array],
    encoding: DeltaEncoding,
    rounding: Keystream,
) -> float:
    """Write float32 tensors as a safetensors file in the order of their names; gives the L2 norm of the
    trained ones as a reader decodes them.

    `constant` is what the aggregator knows without us. A Float32 file has it too, so that other programs can
    read an adapter; for the others it would be most of their bytes. All of it was noised or is public, so
    that nothing here costs privacy.
    """
    tensors = dict(sorted({**trained, **(constant if encoding is DeltaEncoding.FLOAT32 else {})}.items()))
    file.write(encode_header(_shapes(tensors, encoding), METADATA))
    squares = 0.0
    for number, (name, values) in enumerate(tensors.items()):
        whole, scales = (part.tobytes() for part in encode(encoding, values, rounding, number))
        file.write(whole)
        file.write(scales)
        if name in trained:
            squares += sum_of_squares(decode(encoding, whole, scales, 0, values.size))
    return math.sqrt(squares)


def sum_of_squares(values: Array) -> float:
    """In float64, a part at a time."""
    parts = (values[start : start + ELEMENTS_PER_PASS] for start in range(0, len(values), ELEMENTS_PER_PASS))
    return sum(float(np.square(part, dtype=np.float64).sum()) for part in parts)


def _shapes(tensors: Mapping[str, Array], encoding: DeltaEncoding) -> dict[str, tuple[str, tuple[int, ...]]]:
    shapes = {}
    for name, values in tensors.items():
        shape, scales = encoded_shapes(encoding, values.shape)
        shapes[name] = (DTYPES[encoding], shape)
        if scales is not None:
            shapes[name + SCALES_SUFFIX] = ("F32", scales)
    return shapes

"""The file of a client's delta, in the encoding that the round asks for."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tributary_api.round import DeltaEncoding
from tributary_store.tensors import encode_header
from tributary_worker.aggregation.encodings import DTYPES, SCALES_SUFFIX, encode
from tributary_worker.aggregation.numbers import Array
from tributary_worker.privacy.keystream import Keystream

METADATA = {"format": "pt"}
"""For programs that read adapters: the tensors are laid out as PyTorch's are."""


def delta_bytes(delta: Mapping[str, Array], encoding: DeltaEncoding, rounding: Keystream) -> bytes:
    """A safetensors file of float32 tensors, each encoded, in the order of their names.

    What was noised is all that goes in, so nothing here costs privacy.
    """
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    parts: list[Array] = []
    for number, name in enumerate(sorted(delta)):
        values, scales = encode(encoding, delta[name], rounding, number)
        shapes[name] = (DTYPES[encoding], values.shape)
        parts.append(values)
        if len(scales):
            shapes[name + SCALES_SUFFIX] = ("F32", scales.shape)
            parts.append(scales)
    return encode_header(shapes, METADATA) + b"".join(np.ascontiguousarray(part).tobytes() for part in parts)

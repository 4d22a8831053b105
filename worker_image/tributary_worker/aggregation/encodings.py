"""How a noised delta is stored: by client and aggregator alike.

A delta is a safetensors file. The type of a tensor's elements says how it is encoded, so a cohort may be
mixed:

| encoding | tensor                                          | beside it                                  |
|----------|-------------------------------------------------|--------------------------------------------|
| Float32  | F32, in its shape                               |                                            |
| BFloat16 | BF16, in its shape                              |                                            |
| Int8     | I8, in its shape: whole multiples of the scale  | `<name>.scales`, F32, one per 128 elements |
| Int4     | U8, flat: element 2i in the low half of byte i, | `<name>.scales`, F32, one per 128 elements |
|          | 2i + 1 in the high half, each 8 too large       |                                            |

Encoding comes after the noise, so it is post-processing of a private value and costs no ε (Dwork and Roth
2014, proposition 2.1). Rounding is stochastic, hence unbiased (Alistarh et al., "QSGD", NIPS 2017): the mean
of many clients gains digits that each of them lost. A scale is the largest magnitude of its block over 127 or
7; then rounding adds about 1e-4 (Int8) or 0.03 (Int4) of the variance of normal values.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from tributary_api.aggregation import DeltaEncoding
from tributary_store.tensors import DTYPE_BYTES, TensorInfo
from tributary_worker.aggregation.numbers import Array
from tributary_worker.privacy.keystream import Keystream

BLOCK = 128
"""Elements that share a scale: 3 % more bytes for Int8 and 6 % for Int4."""
SCALES_SUFFIX = ".scales"
LEVELS = {DeltaEncoding.INT8: 127, DeltaEncoding.INT4: 7}
"""Magnitude of the largest whole number."""
Bytes = bytes | bytearray | memoryview
DTYPES = {
    DeltaEncoding.FLOAT32: "F32",
    DeltaEncoding.BFLOAT16: "BF16",
    DeltaEncoding.INT8: "I8",
    DeltaEncoding.INT4: "U8",
}
ENCODINGS = {dtype: encoding for encoding, dtype in DTYPES.items()}
NIBBLE_OFFSET = 8
ELEMENTS_PER_PASS = BLOCK << 13
"""Encoded at a time: bounds the working memory at about 30 MB."""

_NIBBLES = np.arange(256, dtype=np.uint8)
BYTE_TO_PAIR: Array = (
    np.stack([_NIBBLES & 15, _NIBBLES >> 4], axis=1).astype(np.float32) - NIBBLE_OFFSET
).view(np.uint64)[:, 0]
"""Both elements of each byte of Int4, as one word of two float32."""


class EncodingError(ValueError):
    """A tensor is not what an encoding of the expected one looks like; the text says how."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """An encoded tensor of `elements` elements: its parts in the file."""

    encoding: DeltaEncoding
    elements: int
    values: TensorInfo
    scales: TensorInfo | None

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.values,) if self.scales is None else (self.values, self.scales)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """First and last byte (exclusive) in the file of elements [start, stop)."""
        if self.encoding is DeltaEncoding.INT4:
            return self.values.start + start // 2, self.values.start + -(-stop // 2)
        width = DTYPE_BYTES[self.values.dtype]
        return self.values.start + start * width, self.values.start + stop * width

    def scales_span(self, start: int, stop: int) -> tuple[int, int]:
        """The same of their scales: no bytes for an encoding without scales."""
        if self.scales is None:
            return self.values.start, self.values.start
        width, first = DTYPE_BYTES[self.scales.dtype], self.scales.start
        return first + start // BLOCK * width, first + _blocks(stop) * width


def stored_tensor(
    tensors: Mapping[str, TensorInfo],
    name: str,
    shape: tuple[int, ...],
    allowed: Collection[DeltaEncoding] = tuple(DeltaEncoding),
) -> StoredTensor:
    """The parts of the tensor `name` among those of a file. EncodingError unless they hold one of `shape`."""
    values = tensors.get(name)
    if values is None:
        raise EncodingError(f"no tensor {name}")
    encoding = ENCODINGS.get(values.dtype)
    if encoding is None or encoding not in allowed:
        raise EncodingError(
            f"tensor {name} has type {values.dtype}, not {', '.join(DTYPES[e] for e in allowed)}"
        )
    due, due_scales = encoded_shapes(encoding, shape)
    if values.shape != due:
        raise EncodingError(f"tensor {name} has shape {values.shape}, not {due}")
    if due_scales is None:
        return StoredTensor(encoding, math.prod(shape), values, None)
    scales = tensors.get(name + SCALES_SUFFIX)
    if scales is None or (scales.dtype, scales.shape) != ("F32", due_scales):
        raise EncodingError(f"tensor {name} needs {name}{SCALES_SUFFIX}, F32 of shape {due_scales}")
    return StoredTensor(encoding, math.prod(shape), values, scales)


def encoded_shapes(
    encoding: DeltaEncoding, shape: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """The shapes of an encoded tensor and of its scales, if it has any."""
    elements = math.prod(shape)
    scales = (_blocks(elements),) if encoding in LEVELS else None
    return ((-(-elements // 2),) if encoding is DeltaEncoding.INT4 else shape), scales


def decode(encoding: DeltaEncoding, values: Bytes, scales: Bytes, start: int, stop: int) -> Array:
    """Elements [start, stop) from the bytes of their spans, as float32 (stop - start,), perhaps read-only.

    EncodingError if a scale is not a number above 0. Whether elements are finite is for the reader to check.
    """
    match encoding:
        case DeltaEncoding.FLOAT32:
            return np.frombuffer(values, "<f4")
        case DeltaEncoding.BFLOAT16:
            bits = np.frombuffer(values, "<u2").astype(np.uint32)
            return np.left_shift(bits, np.uint32(16), out=bits).view(np.float32)
        case DeltaEncoding.INT8:
            whole = np.frombuffer(values, np.int8).astype(np.float32)
        case DeltaEncoding.INT4:
            pairs = BYTE_TO_PAIR[np.frombuffer(values, np.uint8)].view(np.float32)
            whole = pairs[start % 2 :][: stop - start]
    _scale(whole, np.frombuffer(scales, "<f4"), start % BLOCK)
    return whole


def decode_block(stored: StoredTensor, values: Bytes, scales: Bytes, start: int, stop: int) -> Array:
    """`decode` of a tensor in a file."""
    return decode(stored.encoding, values, scales, start, stop)


def _scale(whole: Array, scales: Array, skipped: int) -> None:
    """Multiply, in place, by the scales of blocks of which the first lacks its `skipped` first elements."""
    # No product with a whole number of 8 bits leaves the range of float32.
    if not ((scales > 0) & (scales < np.finfo(np.float32).max / BLOCK)).all():
        raise EncodingError("a scale is not a number above 0")
    if skipped:
        whole[: BLOCK - skipped] *= scales[0]
        whole, scales = whole[BLOCK - skipped :], scales[1:]
    rows = whole[: len(whole) // BLOCK * BLOCK].reshape(-1, BLOCK)
    rows *= scales[: len(rows), None]
    if len(rows) < len(scales):
        whole[len(rows) * BLOCK :] *= scales[-1]


def encode(encoding: DeltaEncoding, values: Array, stream: Keystream, number: int) -> tuple[Array, Array]:
    """A float32 tensor as its file has it, and its scales (none: empty). BFloat16 comes as its bits, uint16.

    The rounding is a pure function of the key, the tensor's `number` and the values: a retry writes the same
    bytes. Values must be finite.
    """
    flat = np.ascontiguousarray(values, np.float32).reshape(-1)
    if encoding is DeltaEncoding.FLOAT32:
        return flat.reshape(values.shape), np.zeros(0, np.float32)
    parts = []
    for start in range(0, max(1, len(flat)), ELEMENTS_PER_PASS):
        piece = flat[start : start + ELEMENTS_PER_PASS]
        parts.append(_encode_pass(encoding, piece, _uniform(stream, number, start, len(piece))))
    whole = np.concatenate([part for part, _ in parts])
    scales = np.concatenate([scale for _, scale in parts])
    return (whole if encoding is DeltaEncoding.INT4 else whole.reshape(values.shape)), scales


def _uniform(stream: Keystream, number: int, start: int, count: int) -> Array:
    """32 random bits (count,) for each element from `start`, a multiple of BLOCK, on."""
    words = stream.words(number, start // 2, -(-count // 2))
    return words.view("<u4")[:count]


def _encode_pass(encoding: DeltaEncoding, values: Array, bits: Array) -> tuple[Array, Array]:
    if encoding is DeltaEncoding.BFLOAT16:
        return _bfloat16(values, bits), np.zeros(0, np.float32)
    scales = _scales(values, LEVELS[encoding])
    ratios = values.astype(np.float64) / np.repeat(scales.astype(np.float64), BLOCK)[: len(values)]
    whole = np.floor(ratios + bits * 2.0**-32)
    if encoding is DeltaEncoding.INT8:
        return whole.astype(np.int8), scales
    nibbles = np.append(whole, np.zeros(len(whole) % 2)).astype(np.int8) + np.int8(NIBBLE_OFFSET)
    low, high = nibbles.astype(np.uint8).reshape(-1, 2).T
    return low | (high << 4), scales


def _bfloat16(values: Array, bits: Array) -> Array:
    """Up with the chance of the part that is cut off: neighbours lie evenly between powers of two."""
    raised = values.view(np.uint32).astype(np.uint64) + (bits & np.uint32(0xFFFF))
    rounded = (raised >> np.uint64(16)).astype(np.uint16)
    # The largest numbers would become infinite.
    is_infinite = (rounded & np.uint16(0x7FFF)) >= np.uint16(0x7F80)
    return np.where(is_infinite, rounded - np.uint16(1), rounded)


def _scales(values: Array, levels: int) -> Array:
    """One scale (blocks,) float32 for each block, so large that no ratio exceeds `levels`."""
    padded = np.zeros(_blocks(len(values)) * BLOCK, np.float32)
    padded[: len(values)] = np.abs(values)
    largest = padded.reshape(-1, BLOCK).max(axis=1).astype(np.float64)
    scales = np.nextafter((largest / levels).astype(np.float32), np.float32(np.inf))
    return np.maximum(scales, np.finfo(np.float32).tiny)


def _blocks(elements: int) -> int:
    return -(-elements // BLOCK)

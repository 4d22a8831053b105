"""The safetensors file format, as far as its header: which tensor lies where. No NumPy, no torch.

A file is an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes
(https://huggingface.co/docs/safetensors, "Format").
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tributary_store.errors import ObjectDamaged

LENGTH_BYTES = 8
HEADER_BYTES_MAX = 100_000_000
"""As in the reference implementation: a longer header is an attack, not a model."""
METADATA = "__metadata__"
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor: its element type as safetensors spells it, and its bytes' place in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    length: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """The tensors of one file in the order of their bytes, and the file's free metadata."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def read_header(name: str, size: int, read: Callable[[int, int], bytes]) -> TensorHeader:
    """Parse the header of a file of `size` bytes through `read(start, length)`.

    ObjectDamaged if it is not a safetensors file whose tensors lie inside it, one after the other.
    """
    if size < LENGTH_BYTES:
        raise _damaged(name, f"{size} bytes")
    length = int.from_bytes(read(0, LENGTH_BYTES), "little")
    if not 2 <= length <= min(size - LENGTH_BYTES, HEADER_BYTES_MAX):
        raise _damaged(name, f"header of {length} bytes in a file of {size}")
    try:
        header = json.loads(read(LENGTH_BYTES, length))
        return _parsed(name, header, LENGTH_BYTES + length, size)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(name, f"malformed header ({type(error).__name__})") from error


def _parsed(name: str, header: dict[str, Any], data_start: int, size: int) -> TensorHeader:
    metadata = {str(key): str(value) for key, value in header.pop(METADATA, {}).items()}
    tensors = sorted(
        (_tensor(tensor, entry, data_start) for tensor, entry in header.items()),
        key=lambda info: (info.start, info.length, info.name),
    )
    position = data_start
    for info in tensors:
        if info.start != position or info.length != _bytes_of(info):
            raise _damaged(name, f"tensor {info.name} does not fill its place")
        position += info.length
    if position != size:
        raise _damaged(name, f"tensors end at byte {position} of {size}")
    return TensorHeader({info.name: info for info in tensors}, metadata)


def _tensor(name: str, entry: dict[str, Any], data_start: int) -> TensorInfo:
    start, end = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    if min(shape, default=0) < 0:
        raise ValueError(name)
    return TensorInfo(name, str(entry["dtype"]), shape, data_start + int(start), int(end) - int(start))


def _bytes_of(info: TensorInfo) -> int:
    return math.prod(info.shape) * DTYPE_BYTES[info.dtype]


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a file that holds these (dtype, shape) one after the other, in the given order."""
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        length = math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + length]}
        position += length
    text = json.dumps(header, separators=(",", ":")).encode()
    # Padding aligns the tensors' bytes to 8, as the reference implementation does.
    text += b" " * (-len(text) % LENGTH_BYTES)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def tensor_places(header: bytes) -> dict[str, int]:
    """The byte at which each tensor starts in a file that begins with this `encode_header`."""
    entries: dict[str, Any] = json.loads(header[LENGTH_BYTES:])
    entries.pop(METADATA, None)
    return {name: len(header) + int(entry["data_offsets"][0]) for name, entry in entries.items()}


def _damaged(name: str, why: str) -> ObjectDamaged:
    return ObjectDamaged(f"{name} is not a whole safetensors file: {why}; save the model again")

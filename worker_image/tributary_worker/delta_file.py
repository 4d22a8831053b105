"""The file of a client's delta, in the encoding that the round asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tributary_api.aggregation import DeltaEncoding
from tributary_store.tensors import encode_header, tensor_places
from tributary_worker.aggregation.encodings import DTYPES, SCALES_SUFFIX, encode, encoded_shapes
from tributary_worker.aggregation.numbers import Array
from tributary_worker.privacy.keystream import Keystream

METADATA = {"format": "pt"}
"""For programs that read adapters: the tensors are laid out as PyTorch's are."""


def write_delta(
    path: Path,
    trained: Mapping[str, Array],
    constant: Mapping[str, Array],
    encoding: DeltaEncoding,
    rounding: Keystream,
) -> None:
    """Write float32 tensors as a safetensors file, in the order of their names.

    `constant` is what the aggregator knows without us. A Float32 file has it too, so that other programs can
    read an adapter; for the others it would be most of their bytes. All of it was noised or is public, so
    that nothing here costs privacy.
    """
    tensors = dict(sorted({**trained, **(constant if encoding is DeltaEncoding.FLOAT32 else {})}.items()))
    header = encode_header(_shapes(tensors, encoding), METADATA)
    places = tensor_places(header)
    with path.open("wb") as file:
        file.write(header)
        for number, (name, values) in enumerate(tensors.items()):
            encoded = encode(encoding, values, rounding, number)
            for stored, part in zip((name, name + SCALES_SUFFIX), encoded, strict=True):
                if stored in places:
                    file.seek(places[stored])
                    file.write(part.tobytes())


def _shapes(tensors: Mapping[str, Array], encoding: DeltaEncoding) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Of what the file holds. The scales come first: a reader of a few tensors finds theirs in one place."""
    shapes, scales = {}, {}
    for name, values in tensors.items():
        shape, of_scales = encoded_shapes(encoding, values.shape)
        shapes[name] = (DTYPES[encoding], shape)
        if of_scales is not None:
            scales[name + SCALES_SUFFIX] = ("F32", of_scales)
    return {**scales, **shapes}

"""Encoded deltas: unbiased, as exact as they say, the same on a retry, and checked before they are used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from tributary_api.aggregation import DeltaEncoding
from tributary_store.tensors import TensorInfo, read_header
from tributary_worker.aggregation import encodings
from tributary_worker.aggregation.encodings import (
    BLOCK,
    EncodingError,
    StoredTensor,
    decode_block,
    stored_tensor,
)
from tributary_worker.aggregation.encodings import encode as encode_tensor
from tributary_worker.delta_file import write_delta
from tributary_worker.privacy.keystream import Keystream

Array = np.ndarray[Any, np.dtype[Any]]
KEY = Keystream(bytes(range(32)))
EVERY = pytest.mark.parametrize("encoding", list(DeltaEncoding))
SCALED = pytest.mark.parametrize("encoding", [DeltaEncoding.INT8, DeltaEncoding.INT4])
ROUNDED = pytest.mark.parametrize("encoding", [e for e in DeltaEncoding if e is not DeltaEncoding.FLOAT32])
LEVELS = {DeltaEncoding.INT8: 127, DeltaEncoding.INT4: 7}


def noise(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def delta_bytes(delta: dict[str, Array], encoding: DeltaEncoding, rounding: Keystream) -> bytes:
    with TemporaryDirectory() as directory:
        path = Path(directory) / "delta"
        write_delta(path, delta, {}, encoding, rounding)
        return path.read_bytes()


def stored(data: bytes, name: str, shape: tuple[int, ...], **limits: Any) -> StoredTensor:
    header = read_header("delta", len(data), lambda start, length: data[start : start + length])
    return stored_tensor(header.tensors, name, shape, **limits)


def part(data: bytes, tensor: StoredTensor, start: int, stop: int) -> Array:
    values, scales = (
        data[slice(*span)] for span in (tensor.span(start, stop), tensor.scales_span(start, stop))
    )
    return decode_block(tensor, values, scales, start, stop)


def decoded(data: bytes, name: str, shape: tuple[int, ...]) -> Array:
    tensor = stored(data, name, shape)
    return part(data, tensor, 0, tensor.elements).reshape(shape)


def there_and_back(encoding: DeltaEncoding, values: Array, key: Keystream = KEY) -> Array:
    return decoded(delta_bytes({"w": values}, encoding, key), "w", values.shape)


def blocks(values: Array) -> Array:
    flat = values.reshape(-1)
    return np.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)


@EVERY
@given(
    shape=st.lists(st.integers(1, 40), min_size=0, max_size=3),
    seed=st.integers(0, 2**32),
    exponent=st.integers(-120, 120),
)
@settings(max_examples=60, deadline=None)
def test_every_element_comes_back_within_one_step(
    encoding: DeltaEncoding, shape: list[int], seed: int, exponent: int
) -> None:
    values = noise(*shape, seed=seed) * np.float32(2.0**exponent)
    back = there_and_back(encoding, values)
    assert back.shape == values.shape
    assert back.dtype == np.float32
    wrong = np.abs(back.astype(np.float64) - values)
    if encoding is DeltaEncoding.FLOAT32:
        assert not wrong.any()
    elif encoding is DeltaEncoding.BFLOAT16:
        assert (wrong <= np.abs(values.astype(np.float64)) * 2.0**-7 + 1e-40).all()
    else:
        step = np.abs(blocks(values)).max(axis=1) / LEVELS[encoding] * (1 + 1e-5) + 1e-37
        assert (blocks(wrong) <= step[:, None]).all()


@ROUNDED
def test_rounding_is_unbiased(encoding: DeltaEncoding) -> None:
    """The mean over many keys comes as close to the value as its own standard error allows."""
    values, draws = noise(3 * BLOCK + 5), 4000
    keys = (Keystream(n.to_bytes(32, "big")) for n in range(draws))
    total, squares = np.zeros(len(values)), np.zeros(len(values))
    for key in keys:
        wrong = there_and_back(encoding, values, key).astype(np.float64) - values
        total, squares = total + wrong, squares + wrong**2
    error, deviation = total / draws, np.sqrt(squares / draws)
    # At 6 standard errors one of a thousand million elements would fail by chance; the product with the scale
    # is a float32, which has an error of its own.
    assert (np.abs(error) <= 6 * deviation / np.sqrt(draws) + 2.0**-22 * np.abs(values)).all()
    assert (deviation > 1e-6).mean() > 0.98
    # Rounding to the nearest would leave an error of the order of the step itself.
    assert np.abs(error).mean() < deviation.mean() / 20


@pytest.mark.parametrize(
    ("encoding", "at_most"),
    [(DeltaEncoding.BFLOAT16, 1e-5), (DeltaEncoding.INT8, 1.2e-4), (DeltaEncoding.INT4, 0.04)],
)
def test_the_variance_that_rounding_adds_is_what_the_documentation_says(
    encoding: DeltaEncoding, at_most: float
) -> None:
    values = noise(1 << 20)
    added = float(np.var(there_and_back(encoding, values) - values) / np.var(values))
    print(f"{encoding}: {added:.3g} of the variance")
    assert at_most / 4 < added < at_most


@EVERY
def test_a_retry_writes_the_same_bytes_and_another_key_others(encoding: DeltaEncoding) -> None:
    delta = {"b": noise(300, 7), "a": noise(300, 7)}
    data = delta_bytes(delta, encoding, KEY)
    assert delta_bytes(dict(reversed(delta.items())), encoding, KEY) == data
    other = delta_bytes(delta, encoding, Keystream(bytes(32)))
    assert (other == data) is (encoding is DeltaEncoding.FLOAT32)
    # No two tensors are rounded alike.
    rounding = [decoded(data, name, (300, 7)) - delta["a"] for name in ("a", "b")]
    assert np.array_equal(*rounding) is (encoding is DeltaEncoding.FLOAT32)


@ROUNDED
def test_how_much_is_encoded_at_a_time_does_not_matter(
    encoding: DeltaEncoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = noise(7 * BLOCK + 3)
    whole = delta_bytes({"w": values}, encoding, KEY)
    monkeypatch.setattr(encodings, "ELEMENTS_PER_PASS", 2 * BLOCK)
    assert delta_bytes({"w": values}, encoding, KEY) == whole


@EVERY
@given(start=st.integers(0, 5 * BLOCK), length=st.integers(1, 3 * BLOCK))
@settings(max_examples=60, deadline=None)
def test_any_part_can_be_decoded_alone(encoding: DeltaEncoding, start: int, length: int) -> None:
    values = noise(5 * BLOCK + 37)
    data = delta_bytes({"first": noise(3), "w": values}, encoding, KEY)
    tensor = stored(data, "w", values.shape)
    start, stop = min(start, len(values) - 1), min(start + length, len(values))
    stop = max(stop, start + 1)
    np.testing.assert_array_equal(
        part(data, tensor, start, stop), decoded(data, "w", values.shape)[start:stop], strict=True
    )


@pytest.mark.parametrize(
    ("encoding", "part_of_float32"),
    [(DeltaEncoding.BFLOAT16, 0.5), (DeltaEncoding.INT8, 0.2579), (DeltaEncoding.INT4, 0.1329)],
)
def test_bytes_on_the_wire(encoding: DeltaEncoding, part_of_float32: float) -> None:
    delta = {f"layer.{i}": noise(256, 256) for i in range(8)}
    sizes = [len(delta_bytes(delta, e, KEY)) for e in (encoding, DeltaEncoding.FLOAT32)]
    assert sizes[0] / sizes[1] == pytest.approx(part_of_float32, abs=0.002)


@EVERY
def test_what_the_aggregator_knows_is_only_sent_where_it_makes_an_adapter_of_the_file(
    encoding: DeltaEncoding, tmp_path: Path
) -> None:
    write_delta(tmp_path / "delta", {"b": noise(9)}, {"a": noise(5)}, encoding, KEY)
    data = (tmp_path / "delta").read_bytes()
    header = read_header("delta", len(data), lambda start, length: data[start : start + length])
    assert ("a" in header.tensors) is (encoding is DeltaEncoding.FLOAT32)


@SCALED
def test_a_block_of_zeros_stays_one(encoding: DeltaEncoding) -> None:
    values = noise(2 * BLOCK)
    values[:BLOCK] = 0.0
    assert not there_and_back(encoding, values)[:BLOCK].any()


def test_the_largest_numbers_do_not_become_infinite() -> None:
    largest = np.full(1000, np.finfo(np.float32).max, np.float32)
    for encoding in DeltaEncoding:
        if encoding is not DeltaEncoding.INT4:  # its scale would be refused: 7 steps span the whole range
            assert np.isfinite(there_and_back(encoding, largest * np.float32(0.99))).all()
    assert np.isfinite(there_and_back(DeltaEncoding.BFLOAT16, -largest)).all()


def an_int8() -> tuple[TensorInfo, TensorInfo, bytes]:
    data = save({"w": np.ones((3, 100), np.int8), "w.scales": np.ones(3, np.float32)})
    tensor = stored(data, "w", (3, 100))
    assert tensor.scales is not None
    return tensor.values, tensor.scales, data


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"values": None}, "no tensor w"),
        ({"values": {"dtype": "I16"}}, "tensor w has type I16"),
        ({"values": {"shape": (100, 3)}}, r"tensor w has shape \(100, 3\), not \(3, 100\)"),
        ({"values": {"dtype": "U8"}}, r"tensor w has shape \(3, 100\), not \(150,\)"),
        ({"scales": None}, r"tensor w needs w\.scales"),
        ({"scales": {"dtype": "F16"}}, r"tensor w needs w\.scales"),
        ({"scales": {"shape": (2,)}}, r"F32 of shape \(3,\)"),
        ({"scales": {"shape": (3, 1)}}, r"F32 of shape \(3,\)"),
    ],
)
def test_what_is_no_encoding_of_the_tensor_is_refused(change: dict[str, Any], says: str) -> None:
    values, scales, _ = an_int8()
    tensors = {"w": values, "w.scales": scales}
    for name, changes in zip(
        ("w", "w.scales"), (change.get("values", {}), change.get("scales", {})), strict=True
    ):
        if changes is None:
            del tensors[name]
        else:
            tensors[name] = replace(tensors[name], **changes)
    with pytest.raises(EncodingError, match=says):
        stored_tensor(tensors, "w", (3, 100))


def test_an_encoding_that_is_not_allowed_is_refused() -> None:
    values, scales, _ = an_int8()
    with pytest.raises(EncodingError, match="type I8, not F32"):
        stored_tensor({"w": values, "w.scales": scales}, "w", (3, 100), [DeltaEncoding.FLOAT32])


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf, 3e38])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_scale_that_is_no_number_above_0_is_refused(scale: float, place: int) -> None:
    scales = np.ones(3, np.float32)
    scales[place] = scale
    data = save({"w": np.ones((3, 100), np.int8), "w.scales": scales})
    with pytest.raises(EncodingError, match="not a number above 0"):
        decoded(data, "w", (3, 100))


def test_the_parts_of_int8_are_those_that_other_programs_read() -> None:
    values = noise(2, BLOCK)
    whole, scales = encode_tensor(DeltaEncoding.INT8, values, KEY, 0)
    assert (whole.dtype, whole.shape, scales.shape) == (np.int8, (2, BLOCK), (2,))
    np.testing.assert_array_equal(whole * scales[:, None], there_and_back(DeltaEncoding.INT8, values))

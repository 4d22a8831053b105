"""What a training publishes in each encoding: the same noised delta, in fewer bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import training_worlds as worlds

from tributary_api.aggregation import DeltaEncoding
from tributary_api.records import DeltaManifest
from tributary_store.tensors import TensorInfo, read_header
from tributary_worker.aggregation.encodings import decode_block, stored_tensor
from tributary_worker.train import train

pytestmark = pytest.mark.usefixtures("alone")
Array = np.ndarray[Any, np.dtype[Any]]


LORA, FULL = {"lora": {"rank": 4, "alpha": 8}}, {"full": {}}


def published(directory: Path, method: Any, encoding: DeltaEncoding) -> tuple[DeltaManifest, bytes]:
    world = worlds.world(directory, method=method, deltaEncoding=encoding)
    train(world.task, world.surroundings)
    manifest = DeltaManifest.model_validate_json(world.store.get(world.task.manifest_uri))
    return manifest, world.store.get(world.task.delta_uri)


def header(data: bytes) -> dict[str, TensorInfo]:
    return dict(read_header("delta", len(data), lambda at, length: data[at : at + length]).tensors)


def trained_values(data: bytes, shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    found = {name: stored_tensor(header(data), name, shape) for name, shape in shapes.items()}
    return {
        name: decode_block(
            tensor,
            data[slice(*tensor.span(0, tensor.elements))],
            data[slice(*tensor.scales_span(0, tensor.elements))],
            0,
            tensor.elements,
        )
        for name, tensor in found.items()
    }


@pytest.mark.parametrize(
    ("method", "encoding", "levels"),
    [(LORA, DeltaEncoding.INT8, 127), (FULL, DeltaEncoding.INT4, 7)],
    ids=["lora", "full"],
)
def test_an_encoded_delta_is_the_same_delta_and_a_retry_publishes_the_same_bytes(
    tmp_path: Path, method: Any, encoding: DeltaEncoding, levels: int
) -> None:
    _, plain = published(tmp_path / "plain", method, DeltaEncoding.FLOAT32)
    manifest, data = published(tmp_path / "first", method, encoding)
    assert published(tmp_path / "again", method, encoding)[1] == data
    shapes = {name: info.shape for name, info in header(plain).items() if "lora_A" not in name}
    assert not [name for name in header(data) if "lora_A" in name], "the aggregator has it from the run key"
    assert len(data) < len(plain) / 2
    exact, rounded = trained_values(plain, shapes), trained_values(data, shapes)
    for name, values in exact.items():
        step = np.abs(values).max() / levels
        assert 0 < np.abs(rounded[name] - values).max() <= step * (1 + 1e-5)
    norm = np.sqrt(sum(np.square(values, dtype=np.float64).sum() for values in rounded.values()))
    assert manifest.l2_norm == pytest.approx(norm, rel=1e-6)
    assert manifest.receipt.epsilon == "4", "what is done to a noised delta costs nothing"

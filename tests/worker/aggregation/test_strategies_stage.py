"""The whole aggregate stage with each strategy, method and encoding, against float64 on whole tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from aggregation_worlds import FROZEN, FULL, SCALE, TRAINED_A, Round, a_round, client, tensors_of

from tributary_api.aggregation import Aggregation, DeltaEncoding
from tributary_api.failures import Reason
from tributary_api.tasks import AggregateTask
from tributary_store import bundle
from tributary_store.tensors import read_header
from tributary_worker import lora
from tributary_worker.aggregation.encodings import decode_block, stored_tensor
from tributary_worker.aggregation.making import Tuning
from tributary_worker.aggregation.strategies import strategy_for
from tributary_worker.delta_file import write_delta
from tributary_worker.failures import StageFailure
from tributary_worker.privacy.keystream import Keystream

Array = np.ndarray[Any, np.dtype[Any]]
ASKED: dict[str, dict[str, Any]] = {
    "FedAvg": {},
    "NormBounding": {},
    "Median": {},
    "TrimmedMean": {"byzantineClients": 1},
    "GeometricMedian": {},
    "Krum": {"byzantineClients": 1},
    "MultiKrum": {"byzantineClients": 1},
}
METHODS = {"frozen-a": FROZEN, "trained-a": TRAINED_A, "full": FULL}


@dataclass(frozen=True)
class Asking(Round):
    """A round with a strategy."""

    aggregation: Mapping[str, Any] | None = None

    @property
    def task(self) -> AggregateTask:
        asked = Aggregation.model_validate(self.aggregation)
        return super().task.model_copy(update={"aggregation": asked})


def asking(made: Round, **aggregation: Any) -> Asking:
    return Asking(**{**vars(made), "aggregation": aggregation})


def a_tiny_round(directory: Path, method: Mapping[str, Any], clients: int = 6) -> Round:
    model = tiny_models.llama(width=16)
    names = lora.target_names(model, lora.LoraSettings(3, 6.0))
    modules = {name: lora.features(model.get_submodule(name)) for name in names}
    return a_round(tiny_models.save(model, directory / "base"), modules, method, clients)


def variables(made: Round, name: str) -> dict[str, Array]:
    """What of a client's delta is combined, by the weight it changes: B, the product BA, or the weight's."""
    delta = {key: values.astype(np.float64) for key, values in made.deltas[name].items()}
    if made.method == FULL:
        return delta
    factor = "base_model.model.{}.lora_{}.weight".format
    pairs = {m: (delta[factor(m, "B")], delta[factor(m, "A")]) for m in made.modules}
    if made.method == FROZEN:
        return {f"{m}.weight": b for m, (b, _) in pairs.items()}
    return {f"{m}.weight": SCALE * b @ a for m, (b, a) in pairs.items()}


def change(made: Round, weight: str, combined: Array) -> Array:
    if made.method != FROZEN:
        return combined
    a = made.deltas["a"][f"base_model.model.{weight.removesuffix('.weight')}.lora_A.weight"]
    return SCALE * combined @ a.astype(np.float64)


def due(made: Asking) -> dict[str, Array]:
    """The new weights: the strategy on one long vector for each client."""
    of_client = [variables(made, name) for name in sorted(made.weights)]
    shapes = {weight: values.shape for weight, values in of_client[0].items()}
    rows = np.stack([np.concatenate([v.ravel() for v in values.values()]) for values in of_client])
    strategy = strategy_for(Aggregation.model_validate(made.aggregation))
    weights = strategy.weights(np.array([made.weights[n] for n in sorted(made.weights)]), rows @ rows.T)
    combined = weights @ rows if strategy.is_linear else strategy.combine(rows, weights)
    new = {name: values.astype(np.float64) for name, values in tensors_of(made.base_directory).items()}
    place = 0
    for weight, shape in shapes.items():
        part = combined[place : place + int(np.prod(shape))].reshape(shape)
        place += part.size
        new[weight] = new[weight] + change(made, weight, part)
    return new


def assert_close(found: Mapping[str, Array], expected: Mapping[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=3e-7, atol=3e-8, err_msg=name)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("strategy", ASKED)
def test_the_new_weights_are_those_of_the_strategy_on_whole_deltas(
    tmp_path: Path, strategy: str, method: Mapping[str, Any]
) -> None:
    made = asking(a_tiny_round(tmp_path, method), strategy=strategy, **ASKED[strategy])
    assert_close(tensors_of(made.result(tmp_path)), due(made))


def recoded(made: Round, encodings: Mapping[str, DeltaEncoding], directory: Path) -> Round:
    """The round after its clients encoded their deltas: with the values that a reader finds."""
    deltas = {}
    for number, (name, delta) in enumerate(made.deltas.items()):
        constant = {n: v for n, v in delta.items() if made.method == FROZEN and "lora_A" in n}
        trained = {n: v for n, v in delta.items() if n not in constant}
        path = directory / f"{name}.safetensors"
        key = Keystream(bytes([number] * 32))
        write_delta(path, trained, constant, encodings[name], key)
        made.publish(name, path.read_bytes())
        deltas[name] = constant | {n: read(path.read_bytes(), n, v.shape) for n, v in trained.items()}
    return replace(made, deltas=deltas)


def read(data: bytes, name: str, shape: tuple[int, ...]) -> Array:
    header = read_header("delta", len(data), lambda at, length: data[at : at + length])
    tensor = stored_tensor(header.tensors, name, shape)
    spans = (tensor.span(0, tensor.elements), tensor.scales_span(0, tensor.elements))
    values, scales = (data[slice(*span)] for span in spans)
    return decode_block(tensor, values, scales, 0, tensor.elements).reshape(shape)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("strategy", ["FedAvg", "Median", "GeometricMedian"])
@pytest.mark.parametrize("block_elements", [1 << 24, 777], ids=["large-blocks", "small-blocks"])
def test_every_client_may_encode_its_delta_in_another_way(
    tmp_path: Path, strategy: str, method: Mapping[str, Any], block_elements: int
) -> None:
    made = a_tiny_round(tmp_path, method, clients=5)
    mixed = recoded(made, dict(zip(made.deltas, cycle(DeltaEncoding), strict=False)), tmp_path)
    asked = asking(mixed, strategy=strategy)
    manifest = asked.run(tmp_path / "work", tuning=Tuning(block_elements=block_elements))
    assert manifest.excluded == []
    bundle.pull(asked.store, manifest.model, tmp_path / "new")
    assert_close(tensors_of(tmp_path / "new"), due(asked))


@pytest.mark.parametrize("encoding", [DeltaEncoding.INT8, DeltaEncoding.INT4])
def test_a_scale_that_is_no_number_excludes_the_delta_by_name(
    tmp_path: Path, encoding: DeltaEncoding
) -> None:
    made = a_tiny_round(tmp_path, FULL, clients=3)
    made = recoded(made, dict.fromkeys(made.deltas, encoding), tmp_path)
    data = bytearray((tmp_path / "b.safetensors").read_bytes())
    header = read_header("delta", len(data), lambda at, length: bytes(data[at : at + length]))
    scales = next(info for name, info in header.tensors.items() if name.endswith(".scales"))
    data[scales.start : scales.start + 4] = np.float32(np.nan).tobytes()
    made.publish("b", bytes(data), l2_norm=1.0)
    manifest = asking(made, strategy="FedAvg").run(tmp_path / "work")
    (excluded,) = manifest.excluded
    assert (excluded.client, excluded.reason) == (str(client("b")), Reason.NON_FINITE_DELTA)
    assert "scale" in excluded.message


def test_exclusions_that_leave_too_few_for_the_strategy_fail_the_round(tmp_path: Path) -> None:
    made = a_tiny_round(tmp_path, FROZEN, clients=5)
    made.publish("c", b"not a delta")
    with pytest.raises(StageFailure, match="Krum needs 5 deltas and 4 are usable") as failure:
        asking(made, strategy="Krum", byzantineClients=1).run(tmp_path / "work")
    assert failure.value.reason is Reason.QUORUM_BROKEN

"""The stage against float64 on whole vectors: strategies, encodings, server optimizers, heads."""

import json
from functools import partial

import numpy as np
import pytest
from aggregation_worlds import FULL, LAYOUT, RUN_KEY, Round, tensors_of
from safetensors.numpy import load, save_file
from small_rounds import SHAPES, base_model, encoded, lora, small_round, vars_of

from tributary_api.aggregation import Aggregation, DeltaEncoding
from tributary_store import bundle, keys
from tributary_store.digests import read_span
from tributary_store.tensors import read_header
from tributary_worker.aggregation.encodings import decode_block, stored_tensor
from tributary_worker.aggregation.making import Tuning
from tributary_worker.aggregation.strategies import server_optimizer_for, strategy_for
from tributary_worker.aggregation.work import Pod

SMALL = Tuning(block_elements=16, shard_bytes=600, poll_seconds=0.01)
STRATEGIES = [
    {},
    {"strategy": "Median"},
    {"strategy": "TrimmedMean", "byzantineClients": 1},
    {"strategy": "GeometricMedian"},
    {"strategy": "Krum", "byzantineClients": 1},
    {"strategy": "MultiKrum", "byzantineClients": 1},
    {"strategy": "NormBounding", "normBound": "0.3"},
]


def combined(deltas, declared, aggregation):
    """What the strategy makes of whole vectors (clients, elements)."""
    strategy, vectors = strategy_for(aggregation), deltas.astype(np.float64)
    gram = vectors @ vectors.T if strategy.needs_gram else None
    weights = strategy.weights(np.array(declared), gram)
    return weights @ vectors if strategy.is_linear else strategy.combine(deltas, weights)


def flat(tensors):
    return np.concatenate([tensors[name].astype(np.float64).reshape(-1) for name in SHAPES])


def change(made, directory):
    new = tensors_of(made.result(directory))
    return flat(new) - flat(tensors_of(made.base_directory))


def vectors_of(made):
    return np.array([flat(delta) for delta in made.deltas.values()], np.float32)


@pytest.mark.parametrize("asked", STRATEGIES, ids=lambda a: a.get("strategy", "FedAvg"))
def test_a_strategy_sees_every_element_of_every_client_in_its_place(tmp_path, asked):
    made = small_round(tmp_path, FULL, 5, **asked)
    due = combined(vectors_of(made), [*made.weights.values()], Aggregation.model_validate(asked))
    # float16 holds one of the tensors.
    np.testing.assert_allclose(change(made, tmp_path), due, atol=2e-3)
    exact = [name for name in SHAPES if "norm" not in name]
    new, old = tensors_of(tmp_path / "new"), tensors_of(made.base_directory)
    offset = 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        if name in exact:
            np.testing.assert_allclose(
                (new[name].astype(np.float64) - old[name]).reshape(-1), due[offset : offset + size], atol=3e-7
            )
        offset += size
    assert (new["model.positions"] == old["model.positions"]).all()


@pytest.mark.parametrize("asked", STRATEGIES, ids=lambda a: a.get("strategy", "FedAvg"))
def test_with_a_trained_the_strategy_judges_products(tmp_path, asked):
    made = small_round(tmp_path, lora(freeze_a=False), 5, **asked)
    new, old = tensors_of(made.result(tmp_path)), tensors_of(made.base_directory)
    products = np.array([products_of(made, delta) for delta in made.deltas.values()])
    due = combined(products, [*made.weights.values()], Aggregation.model_validate(asked))
    names = [f"{module}.weight" for module in made.modules]
    found = np.concatenate([(new[name].astype(np.float64) - old[name]).reshape(-1) for name in names])
    np.testing.assert_allclose(found, due, atol=1e-6)
    assert np.abs(found).max() > 1e-4


def products_of(made, delta):
    factors = [
        [delta[f"base_model.model.{m}.lora_{f}.weight"].astype(np.float64) for f in "BA"]
        for m in made.modules
    ]
    return np.concatenate([2.0 * (b @ a).reshape(-1) for b, a in factors])


def test_a_cohort_may_use_every_encoding(tmp_path):
    encodings = [*DeltaEncoding]
    made = small_round(tmp_path, FULL, 4, encodings)
    seen = np.array([decoded(made, name, encodings[i]) for i, name in enumerate(made.weights)])
    weights = np.array([*made.weights.values()])
    due = weights / weights.sum() @ seen
    assert np.abs(due - combined(vectors_of(made), weights, Aggregation())).max() > 1e-5
    np.testing.assert_allclose(change(made, tmp_path), due, atol=2e-3)


def decoded(made, name, encoding):
    data = encoded(made.deltas[name], encoding)
    path = made.base_directory.parent / f"{name}.safetensors"
    path.write_bytes(data)
    tensors = read_header(name, len(data), partial(read_span, path)).tensors
    values = []
    for tensor, shape in SHAPES.items():
        stored = stored_tensor(tensors, tensor, shape)
        (a, b), (c, d) = stored.span(0, stored.elements), stored.scales_span(0, stored.elements)
        values.append(decode_block(stored, data[a:b], data[c:d], 0, stored.elements))
    return np.concatenate(values).astype(np.float64)


@pytest.mark.parametrize("name", ["FedAvgM", "FedAdam", "FedYogi", "FedAdagrad"])
def test_a_server_optimizer_goes_on_where_the_last_round_stopped(tmp_path, name):
    asked = {"serverOptimizer": {"name": name, "learningRate": "0.05"}}
    made = small_round(tmp_path, FULL, 3, **asked)
    optimizer = server_optimizer_for(Aggregation.model_validate(asked))
    exact = slice(0, 37 * 8 + 8 * 24 + 24 * 8)
    state = [np.full(len(flat(made.deltas["a"])), initial) for initial in optimizer.slots.values()]
    weights = np.array([*made.weights.values()])
    step, due = weights / weights.sum() @ vectors_of(made).astype(np.float64), 0.0
    base = made
    for n in range(3):
        directory = tmp_path / str(n)
        directory.mkdir()
        taken, state = optimizer.step(step, state)
        state = [slot.astype(np.float32).astype(np.float64) for slot in state]
        due = due + taken
        new = tensors_of(base.result(directory))
        found = flat(new) - flat(tensors_of(made.base_directory))
        np.testing.assert_allclose(found[exact], due[exact], rtol=1e-5, atol=1e-6)
        base = next_round(base)
    assert np.abs(due).max() > 0.01


def next_round(made):
    """The same deltas again, on the model that the round made."""
    manifest = json.loads(made.store.get(LAYOUT.aggregate_manifest(RUN_KEY)))
    following = Round(**{**vars_of(made), "base": type(made.base).model_validate(manifest["model"])})
    for uri in [uri for uri in made.store.objects if "/rounds/" in uri]:
        del made.store.objects[uri]
    for name in made.weights:
        following.publish(name)
    return following


def test_another_optimizer_starts_anew(tmp_path):
    made = small_round(tmp_path, FULL, 3, serverOptimizer={"name": "FedAvgM", "learningRate": "1"})
    made.result(tmp_path)
    following = next_round(made)
    plain = Round(**{**vars_of(following), "aggregation": {}})
    first = Round(
        **{
            **vars_of(following),
            "aggregation": {"serverOptimizer": {"name": "FedAvgM", "learningRate": "0.5"}},
        }
    )
    (tmp_path / "a").mkdir()
    half = tensors_of(first.result(tmp_path / "a"))
    for uri in [uri for uri in made.store.objects if "/aggregate/" in uri]:
        del made.store.objects[uri]
    (tmp_path / "b").mkdir()
    whole = tensors_of(plain.result(tmp_path / "b"))
    bundle.pull(made.store, following.base, tmp_path / "base-2")
    old = flat(tensors_of(tmp_path / "base-2"))
    exact = slice(0, 37 * 8)
    np.testing.assert_allclose((flat(half) - old)[exact], 0.5 * (flat(whole) - old)[exact], atol=1e-6)
    assert any(uri.startswith(keys.optimizer_state(following.base.uri)) for uri in made.store.objects)


@pytest.mark.parametrize("freeze_a", [True, False], ids=["frozen-a", "trained-a"])
def test_a_classifiers_head_is_combined_beside_its_adapters(tmp_path, freeze_a):
    made = small_round(tmp_path, lora(freeze_a=freeze_a), 3)
    directory = tmp_path / "with-head"
    base_model(directory)
    head = {"score.weight": np.ones((3, 8), np.float32)}
    save_file(tensors_of(directory) | head, directory / "model.safetensors")
    base = bundle.push(made.store, directory, LAYOUT.models)
    made = Round(
        **{
            **vars_of(made),
            "base": base,
            "base_directory": directory,
            "task_kind": "SequenceClassification",
            "deltas": {n: d | {"score.weight": d_of(n)} for n, d in made.deltas.items()},
        }
    )
    for name in made.weights:
        made.publish(name)
    new = tensors_of(made.result(tmp_path))
    due = sum(made.weights[n] * d_of(n).astype(np.float64) for n in made.weights) / sum(made.weights.values())
    np.testing.assert_allclose(new["score.weight"], 1 + due, atol=1e-6)
    plain = "model.layers.0.mlp.up_proj.weight"
    assert np.abs(new[plain] - tensors_of(directory)[plain]).max() > 1e-4


def d_of(name):
    return np.full((3, 8), ord(name) / 100, np.float32)


def test_a_divided_model_has_an_index(tmp_path):
    made = small_round(tmp_path, FULL, 3)
    manifest = made.run(tmp_path / "work", Pod(), SMALL)
    bundle.pull(made.store, manifest.model, tmp_path / "new")
    index = json.loads((tmp_path / "new" / "model.safetensors.index.json").read_bytes())
    assert len(set(index["weight_map"].values())) > 1
    for name, file in index["weight_map"].items():
        assert name in load((tmp_path / "new" / file).read_bytes())
    whole = tensors_of(small_round_again(tmp_path).result(tmp_path / "again"))
    divided = tensors_of(tmp_path / "new")
    assert whole.keys() == divided.keys()
    assert all(np.array_equal(whole[name], divided[name]) for name in whole)


def small_round_again(tmp_path):
    (tmp_path / "again").mkdir()
    return small_round(tmp_path / "again", FULL, 3)

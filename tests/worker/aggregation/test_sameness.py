"""The same deltas give the same bytes: however the work is cut up, shared, killed and taken up again."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from aggregation_worlds import FULL, LAYOUT, RUN_KEY, Round, client
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from small_rounds import KilledError, MortalStore, lora, run_pods, small_round, vars_of

from tributary_api.aggregation import DeltaEncoding
from tributary_worker.aggregation.making import Tuning

SHARD_BYTES = 600
"""Divides the small model into several files."""
WHOLE = Tuning(shard_bytes=SHARD_BYTES, poll_seconds=0.01, wait_seconds_max=60.0)
METHODS = {"full": FULL, "frozen-a": lora(freeze_a=True), "trained-a": lora(freeze_a=False)}
AGGREGATIONS = [
    {},
    {"weighting": "Uniform", "serverOptimizer": {"name": "FedAdam", "learningRate": "0.1"}},
    {"strategy": "Median"},
    {"strategy": "TrimmedMean", "byzantineClients": 1},
    {"strategy": "GeometricMedian"},
    {"strategy": "Krum", "byzantineClients": 1},
    {"strategy": "MultiKrum", "byzantineClients": 1},
    {"strategy": "NormBounding", "normBound": "1"},
]
tunings = st.builds(
    Tuning,
    block_elements=st.sampled_from([1, 7, 64, 1 << 20]),
    ahead=st.integers(1, 5),
    shard_bytes=st.just(SHARD_BYTES),
    poll_seconds=st.just(0.01),
    wait_seconds_max=st.just(60.0),
)
encodings = st.lists(st.sampled_from(DeltaEncoding), min_size=1, max_size=3)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(METHODS)), st.sampled_from(AGGREGATIONS), encodings, tunings, st.data())
def test_neither_blocks_nor_pods_nor_order_change_a_byte(method, aggregation, stored, tuning, data):
    stored = stored if method == "full" else [DeltaEncoding.FLOAT32]
    with TemporaryDirectory() as root:
        Path(root, "a").mkdir()
        made = small_round(Path(root, "a"), METHODS[method], 6, stored, **aggregation)
        whole = made.run(Path(root, "work"), tuning=WHOLE)
        del made.store.objects[LAYOUT.aggregate_manifest(RUN_KEY)]
        for uri in [u for u in made.store.objects if "/aggregate/" in u or u.startswith(whole.model.uri)]:
            del made.store.objects[uri]
        names = data.draw(st.permutations(list(made.weights)))
        manifests = run_pods(made.only(*names), data.draw(st.integers(1, 4)), tuning)
        assert {manifest.model for manifest in manifests} == {whole.model}
        assert made.store.unfinished == []


def finished_model(store):
    return {uri: data for uri, data in store.objects.items() if "/models/" in uri}


@pytest.mark.parametrize("dies_after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("method", METHODS)
def test_killed_at_any_write_it_ends_with_the_same_bytes(tmp_path, method, dies_after):
    optimizer = {"name": "FedYogi", "learningRate": "0.1"}
    made = small_round(tmp_path, METHODS[method], 3, serverOptimizer=optimizer)
    made.publish("b", b"no delta")  # an exclusion is a write, too
    start = dict(made.store.objects)
    whole = mortal(made, start)
    whole.run(tmp_path / "whole", tuning=WHOLE)
    writes = whole.store.writes
    assert writes > 20
    for n in range(writes):
        again = mortal(made, start, n, dies_after=dies_after)
        with pytest.raises(KilledError):
            again.run(tmp_path / f"{n}-killed", tuning=WHOLE)
        again.store.revive()
        again.run(tmp_path / f"{n}-again", tuning=WHOLE)
        assert finished_model(again.store) == finished_model(whole.store)
        assert again.store.unfinished == []


def mortal(made, objects, writes_left=-1, *, dies_after=False):
    store = MortalStore(dict(objects), writes_left=writes_left, dies_after=dies_after)
    return Round(**{**vars_of(made), "store": store})


def test_what_is_recorded_is_not_read_again(tmp_path):
    made = small_round(tmp_path, FULL, 3)
    made.run(tmp_path / "one", tuning=WHOLE)
    del made.store.objects[LAYOUT.aggregate_manifest(RUN_KEY)]
    before = made.store.bytes_read
    made.run(tmp_path / "two", tuning=WHOLE)
    deltas = sum(len(made.store.get(LAYOUT.delta(client(n), RUN_KEY))) for n in made.weights)
    headers_and_records = made.store.bytes_read - before - deltas
    assert headers_and_records < 3 * deltas


def test_a_delta_that_proves_bad_at_one_pod_is_left_out_by_all(tmp_path):
    """Its last tensor is in the shard of the last pod; the first pods are done by then."""
    made = small_round(tmp_path, FULL, 4)
    delta = dict(made.deltas["b"])
    delta["model.scale"] = np.array([np.nan], np.float32)
    made.publish(
        "b", save(delta), l2_norm=float(np.sqrt(sum(np.square(v).sum() for v in made.deltas["b"].values())))
    )
    manifests = run_pods(made, 3, WHOLE)
    assert [(f.client, f.reason) for f in manifests[0].excluded] == [(str(client("b")), "NonFiniteDelta")]
    (tmp_path / "o").mkdir()
    others = small_round(tmp_path / "o", FULL, 4).only("a", "c", "d").run(tmp_path / "others", tuning=WHOLE)
    assert {manifest.model.digest for manifest in manifests} == {others.model.digest}


def test_another_set_of_deltas_uses_nothing_of_the_first(tmp_path):
    made = small_round(tmp_path, FULL, 4)
    first = made.run(tmp_path / "one", tuning=WHOLE)
    del made.store.objects[LAYOUT.aggregate_manifest(RUN_KEY)]
    second = made.only("a", "b").run(tmp_path / "two", tuning=WHOLE)
    assert first.model.uri != second.model.uri
    assert first.model.digest != second.model.digest

"""The compress stage against a store: what it publishes, and that it publishes it once."""

from __future__ import annotations

import pytest
import structlog
import tiny_models
import torch
from memory_store import MemoryStore

from tributary_api.failures import Reason
from tributary_api.records import CompressionManifest
from tributary_api.release import CompressionStep, Distill, Prune, QuantizationScheme, Quantize
from tributary_api.shared import DatasetRef, ModelRef, StoreEndpoint, TaskKind
from tributary_api.tasks import CompressTask
from tributary_store import bundle
from tributary_worker.compress import compress
from tributary_worker.compression.loading import load_model
from tributary_worker.failures import StageFailure

LOG = structlog.get_logger()
INT8 = CompressionStep(quantize=Quantize(scheme=QuantizationScheme.INT8))
PRUNE = CompressionStep(prune=Prune(ffn_fraction="0.33", max_sequence_length=16))
MODELS, RELEASES = "s3://hub/models/", "s3://hub/releases/"
MANIFEST = "s3://hub/releases/manifests/key.json"


@pytest.fixture
def store():
    return MemoryStore()


@pytest.fixture
def parent(store, tmp_path):
    return bundle.push(store, tiny_models.save(tiny_models.llama(width=256), tmp_path / "parent"), MODELS)


def a_task(model, steps=(INT8,)):
    return CompressTask(
        task=TaskKind.CAUSAL_LM,
        model=model,
        steps=list(steps),
        store=StoreEndpoint(),
        releases_uri=RELEASES,
        manifest_uri=MANIFEST,
    )


def test_the_bundle_and_its_manifest(store, parent, tmp_path):
    manifest = compress(store, a_task(parent), LOG)
    assert manifest == CompressionManifest.model_validate_json(store.get(MANIFEST))
    assert manifest.parent == parent
    assert manifest.model.uri.startswith(RELEASES)
    assert manifest.bytes <= 0.3 * manifest.parent_bytes
    pulled = bundle.pull(store, manifest.model, tmp_path / "pulled")
    assert pulled.parents == [parent]
    assert manifest.bytes == sum(f.stat().st_size for f in (tmp_path / "pulled").glob("*.safetensors"))
    model = load_model(tmp_path / "pulled", TaskKind.CAUSAL_LM).model
    assert torch.isfinite(model(torch.arange(10)[None]).logits).all()


def test_a_second_attempt_changes_and_computes_nothing(store, parent):
    compress(store, a_task(parent), LOG)
    before, read = dict(store.objects), store.bytes_read
    compress(store, a_task(parent), LOG)
    assert store.objects == before
    assert store.bytes_read - read < 2 * len(store.objects[MANIFEST])


def test_an_attempt_killed_before_the_manifest_is_repeated_to_the_byte(store, parent):
    first = compress(store, a_task(parent), LOG)
    del store.objects[MANIFEST]
    assert compress(store, a_task(parent), LOG) == first


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda ref: ModelRef(uri=ref.uri + "0", digest=ref.digest), Reason.MODEL_MISSING),
        (lambda ref: ModelRef(uri=ref.uri, digest="sha256:" + 64 * "0"), Reason.MODEL_DIGEST_MISMATCH),
    ],
)
def test_a_wrong_reference_is_a_failure_of_its_own(store, parent, change, reason):
    with pytest.raises(StageFailure) as failure:
        compress(store, a_task(change(parent)), LOG)
    assert failure.value.reason is reason
    assert MANIFEST not in store.objects


@pytest.mark.parametrize("steps", [(INT8, INT8), (CompressionStep(),), (INT8, PRUNE)])
def test_impossible_steps_are_refused(store, parent, steps):
    with pytest.raises(StageFailure, match="quantize") as failure:
        compress(store, a_task(parent, steps), LOG)
    assert failure.value.reason is Reason.TASK_INVALID
    assert MANIFEST not in store.objects


def test_steps_in_order_end_in_a_model_that_loads(store, parent, tmp_path):
    steps = [
        PRUNE,
        CompressionStep(distill=Distill(steps=2, batch_size=2, sampled_fraction="1", sampled_texts=4)),
    ]
    manifest = compress(store, a_task(parent, [*steps, INT8]), LOG)
    assert manifest.bytes < 0.25 * manifest.parent_bytes
    bundle.pull(store, manifest.model, tmp_path / "pulled")
    loaded = load_model(tmp_path / "pulled", TaskKind.CAUSAL_LM)
    assert loaded.model.config.intermediate_size == 512
    assert loaded.tokenizer("fox").input_ids == tiny_models.byte_tokenizer()("fox").input_ids


def test_a_step_reads_the_public_data_set_that_it_names(store, parent):
    missing = DatasetRef(uri="s3://hub/datasets/gone.jsonl", digest="sha256:" + 64 * "0")
    step = CompressionStep(prune=Prune(ffn_fraction="0.3", dataset=missing))
    with pytest.raises(StageFailure) as failure:
        compress(store, a_task(parent, [step]), LOG)
    assert failure.value.reason is Reason.DATA_EMPTY

"""The compress stage against a store: what it publishes, and that it publishes it once."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from memory_store import MemoryStore

from tributary_api.failures import Reason
from tributary_api.records import CompressionManifest
from tributary_api.release import CompressionStep, QuantizationScheme, Quantize
from tributary_api.shared import ModelRef, StoreEndpoint, TaskKind
from tributary_api.tasks import CompressTask
from tributary_store import bundle
from tributary_worker.compress import compress
from tributary_worker.compression.loading import load_model
from tributary_worker.failures import StageFailure

INT8 = CompressionStep(quantize=Quantize(scheme=QuantizationScheme.INT8))
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
    manifest = compress(store, a_task(parent))
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
    compress(store, a_task(parent))
    before, read = dict(store.objects), store.bytes_read
    compress(store, a_task(parent))
    assert store.objects == before
    assert store.bytes_read - read < 2 * len(store.objects[MANIFEST])


def test_an_attempt_killed_before_the_manifest_is_repeated_to_the_byte(store, parent):
    first = compress(store, a_task(parent))
    del store.objects[MANIFEST]
    assert compress(store, a_task(parent)) == first


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda ref: ModelRef(uri=ref.uri + "0", digest=ref.digest), Reason.MODEL_MISSING),
        (lambda ref: ModelRef(uri=ref.uri, digest="sha256:" + 64 * "0"), Reason.MODEL_DIGEST_MISMATCH),
    ],
)
def test_a_wrong_reference_is_a_failure_of_its_own(store, parent, change, reason):
    with pytest.raises(StageFailure) as failure:
        compress(store, a_task(change(parent)))
    assert failure.value.reason is reason
    assert MANIFEST not in store.objects


@pytest.mark.parametrize("steps", [(INT8, INT8), (CompressionStep(),)])
def test_impossible_steps_are_refused(store, parent, steps):
    with pytest.raises(StageFailure, match="quantize"):
        compress(store, a_task(parent, steps))
    assert MANIFEST not in store.objects

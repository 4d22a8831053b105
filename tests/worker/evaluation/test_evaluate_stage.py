"""The evaluate stage against a store: its report, written once, and what it refuses."""

from __future__ import annotations

import json

import pytest
import structlog
import tiny_models
import torch
from memory_store import MemoryStore

from tributary_api.base import sha256_of
from tributary_api.failures import Reason
from tributary_api.records import EvaluationReport
from tributary_api.shared import DatasetRef, ModelRef, StoreEndpoint, TaskKind
from tributary_api.tasks import EvaluateTask, ScoredModel
from tributary_store import bundle
from tributary_worker.evaluate import evaluate
from tributary_worker.failures import StageFailure

DATASET, REPORT = "s3://hub/datasets/public.jsonl", "s3://hub/rounds/key/evaluation.json"
LINES = b"".join(json.dumps({"text": f"public text {i}"}).encode() + b"\n\n" for i in range(5))
LOG = structlog.get_logger()


@pytest.fixture
def store():
    store = MemoryStore()
    store.put_new(DATASET, LINES)
    return store


def pushed(store, tmp_path, model, name="model"):
    return bundle.push(store, tiny_models.save(model, tmp_path / name), "s3://hub/models/")


def a_task(models, data=LINES):
    return EvaluateTask(
        task=TaskKind.CAUSAL_LM,
        models=[ScoredModel(role=role, model=ref) for role, ref in models.items()],
        dataset=DatasetRef(uri=DATASET, digest=sha256_of(data)),
        store=StoreEndpoint(),
        report_uri=REPORT,
    )


def test_every_model_is_reported_under_its_role(store, tmp_path):
    models = {
        "baseline": pushed(store, tmp_path, tiny_models.llama(), "baseline"),
        "new": pushed(store, tmp_path, tiny_models.llama(seed=1), "new"),
    }
    report = evaluate(store, a_task(models), LOG)
    assert report == EvaluationReport.model_validate_json(store.get(REPORT))
    assert {score.role: score.model for score in report.scores} == models
    assert report.dataset_digest == sha256_of(LINES)
    baseline, new = report.scores
    assert baseline.documents == new.documents == 5
    assert baseline.tokens == new.tokens == 5 * (len("public text 0") - 1)
    assert baseline.loss != new.loss


def test_a_second_attempt_finds_the_report(store, tmp_path):
    task = a_task({"new": pushed(store, tmp_path, tiny_models.llama())})
    report = evaluate(store, task, LOG)
    for uri in [uri for uri in store.objects if uri.startswith("s3://hub/models/")]:
        del store.objects[uri]
    assert evaluate(store, task, LOG) == report


@pytest.mark.parametrize(
    ("lines", "reason", "words"),
    [
        (b"", Reason.DATA_EMPTY, "no documents"),
        (b"\n \n", Reason.DATA_EMPTY, "no documents"),
        (b'{"text": "ok"}\n{"text": 7}\n', Reason.DATA_UNPARSEABLE, "line 2 has no string"),
        (b'{"text": "ok"\n', Reason.DATA_UNPARSEABLE, "line 1 is not JSON"),
        (b"[1]\n", Reason.DATA_UNPARSEABLE, "line 1 has no string"),
        (b'{"text": "\\ud800"}\n', Reason.DATA_UNPARSEABLE, "line 1 holds half a surrogate"),
    ],
)
def test_a_bad_data_set_is_named(store, tmp_path, lines, reason, words):
    store.objects[DATASET] = lines
    with pytest.raises(StageFailure, match=words) as failure:
        evaluate(store, a_task({"new": pushed(store, tmp_path, tiny_models.llama())}, lines), LOG)
    assert failure.value.reason is reason


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda store: store.objects.pop(DATASET), Reason.DATA_EMPTY),
        (lambda store: store.objects.update({DATASET: LINES + b"\n"}), Reason.DATASET_DIGEST_MISMATCH),
    ],
)
def test_other_bytes_than_promised_are_refused(store, tmp_path, spoil, reason):
    task = a_task({"new": pushed(store, tmp_path, tiny_models.llama())})
    spoil(store)
    with pytest.raises(StageFailure) as failure:
        evaluate(store, task, LOG)
    assert failure.value.reason is reason
    assert REPORT not in store.objects


def test_a_missing_model_is_named(store):
    gone = ModelRef(uri="s3://hub/models/gone", digest="sha256:" + 64 * "0")
    with pytest.raises(StageFailure, match="s3://hub/models/gone") as failure:
        evaluate(store, a_task({"new": gone}), LOG)
    assert failure.value.reason is Reason.MODEL_MISSING


def test_a_broken_model_is_named(store, tmp_path):
    model = tiny_models.llama()
    torch.nn.init.constant_(model.model.norm.weight, float("inf"))
    with pytest.raises(StageFailure, match="new model s3://hub/models/") as failure:
        evaluate(store, a_task({"new": pushed(store, tmp_path, model)}), LOG)
    assert failure.value.reason is Reason.MODEL_UNSUPPORTED
    assert REPORT not in store.objects

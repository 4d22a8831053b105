"""The `evaluate` stage: score models on a public data set and report it, once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tributary_api.failures import Reason
from tributary_api.records import DocumentScore, EvaluationReport
from tributary_api.tasks import EvaluateTask, ScoredModel
from tributary_store.objects import Objects
from tributary_worker.compression.loading import fetch_model
from tributary_worker.documents import Document, read_documents
from tributary_worker.failures import StageFailure
from tributary_worker.scoring import NonFiniteScoreError, model_score, score_documents
from tributary_worker.store_access import open_store, record_once, store_failures
from tributary_worker.task_input import progress_reporter, read_task, stage_log


def main(_argv: Sequence[str]) -> int:
    task = read_task(EvaluateTask)
    log = stage_log("evaluate")
    report = evaluate(open_store(task.store), task, log)
    for score in report.scores:
        log.info("evaluated", role=score.role, loss=score.loss, accuracy=score.accuracy, tokens=score.tokens)
    return 0


def evaluate(store: Objects, task: EvaluateTask, log: Any) -> EvaluationReport:
    """Write the report, or find it. Raises StageFailure."""
    return record_once(store, task.report_uri, EvaluationReport, lambda: _report(store, task, log), log)


def _report(store: Objects, task: EvaluateTask, log: Any) -> EvaluationReport:
    with store_failures(missing=Reason.DATA_EMPTY):
        documents = read_documents(store, task.dataset, task.task)
    scores = []
    for scored in task.models:
        found = _scores(store, task, scored, documents, log)
        scores.append(model_score(scored, found))
    return EvaluationReport(task=task.task, dataset_digest=task.dataset.digest, scores=scores)


def _scores(
    store: Objects, task: EvaluateTask, scored: ScoredModel, documents: Sequence[Document], log: Any
) -> list[DocumentScore]:
    loaded = fetch_model(store, scored.model, task.task)
    report = progress_reporter(log, role=scored.role)
    try:
        return score_documents(loaded, documents, task.task, task.max_sequence_length, report)
    except NonFiniteScoreError as error:
        message = f"{scored.role} model {scored.model.uri}: {error}; it is broken and cannot be evaluated"
        raise StageFailure(Reason.MODEL_UNSUPPORTED, message) from error

"""The `compress` stage: make a smaller bundle of a model, step by step, and say what came out.

It reads the model and, where a step names one, a public data set; never a client's data. The manifest is
written last and makes the compressed model exist; a later attempt finds it and does nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tributary_api.failures import Reason
from tributary_api.records import CompressionManifest
from tributary_api.release import CompressionStep, Distill
from tributary_api.shared import DatasetRef, TaskKind
from tributary_api.tasks import CompressTask
from tributary_store import bundle
from tributary_store.errors import ObjectExists
from tributary_store.objects import Objects
from tributary_worker.compression.distill import distill_directory
from tributary_worker.compression.prune import prune_directory
from tributary_worker.compression.quantize import precision_of, quantize_directory
from tributary_worker.documents import Document, read_documents
from tributary_worker.failures import StageFailure
from tributary_worker.store_access import open_store, store_failures
from tributary_worker.task_input import progress_reporter, read_task, stage_log


def main(_argv: Sequence[str]) -> int:
    task = read_task(CompressTask)
    log = stage_log("compress")
    manifest = compress(open_store(task.store), task, log)
    log.info("compressed", model=manifest.model.uri, bytes=manifest.bytes, parent_bytes=manifest.parent_bytes)
    return 0


def compress(store: Objects, task: CompressTask, log: Any) -> CompressionManifest:
    """Publish the compressed bundle and its manifest, or find them. Raises StageFailure."""
    with store_failures():
        if store.head(task.manifest_uri) is None:
            with tempfile.TemporaryDirectory() as workspace:
                _publish(store, task, _compressed(store, task, Path(workspace), log))
        return CompressionManifest.model_validate_json(store.get(task.manifest_uri))


def _compressed(store: Objects, task: CompressTask, workspace: Path, log: Any) -> Path:
    _check_order(task.steps)
    teacher = directory = workspace / "parent"
    bundle.pull(store, task.model, teacher)
    for number, step in enumerate(task.steps, start=1):
        target = workspace / f"step-{number}"
        target.mkdir()
        _apply(step, _Work(store, task.task, teacher, directory, target, log))
        directory = target
    return directory


def _check_order(steps: Sequence[CompressionStep]) -> None:
    if any(step.quantize is not None for step in steps[:-1]):
        raise StageFailure(Reason.TASK_INVALID, "integers are not trained: make quantize the last step, once")


@dataclass(frozen=True, slots=True)
class _Work:
    """What a step works on: from the directory `source` to the empty `target`."""

    store: Objects
    task: TaskKind
    teacher: Path
    """The uncompressed model."""
    source: Path
    target: Path
    log: Any

    def documents(self, ref: DatasetRef | None) -> list[Document]:
        if ref is None:
            return []
        with store_failures(missing=Reason.DATA_EMPTY):
            return read_documents(self.store, ref, self.task)


def _apply(step: CompressionStep, work: _Work) -> None:
    if step.prune is not None:
        prune_directory(work.source, work.target, step.prune, work.task, work.documents(step.prune.dataset))
    elif step.distill is not None:
        _distill(step.distill, work)
    elif step.quantize is not None:
        quantize_directory(work.source, work.target, precision_of(step.quantize))
    else:
        message = "a compression step names nothing to do; write prune, distill or quantize"
        raise StageFailure(Reason.TASK_INVALID, message)


def _distill(step: Distill, work: _Work) -> None:
    if work.task is not TaskKind.CAUSAL_LM:
        raise StageFailure(Reason.TASK_INVALID, "only language models are distilled: remove the distill step")
    distill_directory(
        work.source,
        work.target,
        step,
        teacher=work.teacher,
        documents=work.documents(step.dataset),
        report=progress_reporter(work.log, step="distill"),
    )


def _publish(store: Objects, task: CompressTask, directory: Path) -> None:
    parent = bundle.read_manifest(store, task.model)
    steps = ", ".join(str(step.to_json_object()) for step in task.steps)
    ref = bundle.push(
        store, directory, task.releases_uri, parents=[task.model], description=f"compressed with {steps}"
    )
    manifest = CompressionManifest(
        parent=task.model,
        model=ref,
        bytes=bundle.weight_bytes(bundle.read_manifest(store, ref)),
        parent_bytes=bundle.weight_bytes(parent),
    )
    try:
        store.put_new(task.manifest_uri, manifest.canonical_json(), retain=True)
    except ObjectExists:
        # Another attempt was faster, with a library that rounds otherwise: the first one is the model.
        return

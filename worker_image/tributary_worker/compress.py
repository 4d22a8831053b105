"""The `compress` stage: make a smaller bundle of a model, step by step, and say what came out.

It reads the model and nothing else: no text, no client's data. The manifest is written last and makes the
compressed model exist; a later attempt finds it and does nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from tributary_api.failures import Reason
from tributary_api.records import CompressionManifest
from tributary_api.release import CompressionStep
from tributary_api.tasks import CompressTask
from tributary_store import bundle
from tributary_store.errors import ObjectExists
from tributary_store.objects import Objects
from tributary_worker.compression.quantize import quantize_directory
from tributary_worker.failures import StageFailure
from tributary_worker.store_access import open_store, store_failures
from tributary_worker.task_input import read_task, stage_log


def main(_argv: Sequence[str]) -> int:
    task = read_task(CompressTask)
    log = stage_log("compress")
    manifest = compress(open_store(task.store), task)
    log.info("compressed", model=manifest.model.uri, bytes=manifest.bytes, parent_bytes=manifest.parent_bytes)
    return 0


def compress(store: Objects, task: CompressTask) -> CompressionManifest:
    """Publish the compressed bundle and its manifest, or find them. Raises StageFailure."""
    with store_failures():
        if store.head(task.manifest_uri) is None:
            with tempfile.TemporaryDirectory() as workspace:
                _publish(store, task, _compressed(store, task, Path(workspace)))
        return CompressionManifest.model_validate_json(store.get(task.manifest_uri))


def _compressed(store: Objects, task: CompressTask, workspace: Path) -> Path:
    directory = workspace / "parent"
    bundle.pull(store, task.model, directory)
    for number, step in enumerate(task.steps, start=1):
        target = workspace / f"step-{number}"
        target.mkdir()
        _apply(step, directory, target)
        directory = target
    return directory


def _apply(step: CompressionStep, source: Path, target: Path) -> None:
    if step.quantize is None:
        raise StageFailure(
            Reason.TASK_INVALID, "a compression step names nothing to do; write quantize: {...}"
        )
    quantize_directory(source, target)


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

"""The `aggregate` stage: the mean of the clients' deltas, added to the round's base model (FedAvg).

    adopt the model if it is published already       open the base model: its headers, no weights
    check every delta; leave bad ones out by name    is the quorum still met?
    write the new weights, tensor by tensor          publish the bundle, then the manifest

Without torch: little memory, no start-up time. Where the accepted deltas are the same, so is every byte.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tributary_api.failures import Reason
from tributary_api.records import AggregateManifest
from tributary_api.round import ClientFailure
from tributary_api.shared import ModelRef
from tributary_api.tasks import AggregateTask
from tributary_store import bundle
from tributary_store.errors import ObjectExists
from tributary_store.objects import Objects
from tributary_worker.aggregation.base import BaseModel, open_base
from tributary_worker.aggregation.deltas import Delta, DeltaRejectedError, ExpectedTensor, inspect
from tributary_worker.aggregation.merge import write_weights
from tributary_worker.aggregation.methods import plan_for
from tributary_worker.failures import StageFailure
from tributary_worker.store_access import open_store, store_failures
from tributary_worker.task_input import progress_reporter, read_task, stage_log

NAMED_IN_MESSAGE_MAX = 5


def main(_argv: Sequence[str]) -> int:
    task, log = read_task(AggregateTask), stage_log("aggregate")
    with tempfile.TemporaryDirectory() as directory, store_failures():
        manifest = aggregate(task, open_store(task.store), Path(directory), log)
    log.info(
        "done", model=manifest.model.uri, included=len(manifest.included), bytes_read=manifest.bytes_read
    )
    return 0


def aggregate(task: AggregateTask, store: Objects, directory: Path, log: Any) -> AggregateManifest:
    """Run the task with `directory` as space for the new weights. Raises StageFailure and StoreError."""
    if store.head(task.manifest_uri) is not None:
        return published(task, store)
    base = open_base(store, task.base_model)
    plan = plan_for(task.method, base, task.run_key)
    cohort = examine(task, store, plan.expected(), log)
    require_quorum(task, cohort)
    report = progress_reporter(log, what="tensors")
    write_weights(base, plan, cohort.usable, directory, report)
    copy_other_files(store, base, directory)
    model = bundle.push(
        store,
        directory,
        task.models_uri,
        parents=[task.base_model],
        run_key=task.run_key,
        description=f"round {task.round}",
    )
    return publish(task, store, model, cohort, base)


@dataclass(frozen=True, slots=True)
class Cohort:
    """The deltas of a round after every check, in the order of the clients' names."""

    usable: list[Delta]
    excluded: list[ClientFailure]


def examine(task: AggregateTask, store: Objects, expected: Mapping[str, ExpectedTensor], log: Any) -> Cohort:
    cohort, report = Cohort([], []), progress_reporter(log, what="deltas")
    # Sums of floats depend on the order, so it must not depend on the task's.
    for done, delta in enumerate(sorted(task.deltas, key=lambda d: str(d.client)), start=1):
        try:
            cohort.usable.append(inspect(store, task, delta, expected))
        except DeltaRejectedError as error:
            log.warning("delta excluded", client=str(delta.client), reason=error.reason, message=str(error))
            cohort.excluded.append(
                ClientFailure(client=str(delta.client), reason=error.reason, message=str(error)[:1024])
            )
        report(done, len(task.deltas))
    return cohort


def require_quorum(task: AggregateTask, cohort: Cohort) -> None:
    if len(cohort.usable) >= task.quorum:
        return
    named = [f"{f.client} ({f.reason})" for f in cohort.excluded[:NAMED_IN_MESSAGE_MAX]]
    raise StageFailure(
        Reason.QUORUM_BROKEN,
        f"{len(cohort.usable)} usable deltas of {len(task.deltas)}, the quorum is {task.quorum}; "
        f"excluded: {', '.join(named) or 'none'}; "
        "start another round with other clients or a smaller minAvailable",
    )


def copy_other_files(store: Objects, base: BaseModel, directory: Path) -> None:
    """Configuration and tokenizer of the base model."""
    weights = {file.digest.path for file in base.files}
    for file in base.manifest.files:
        if file.path not in weights:
            store.download(bundle.file_uri(base.ref, file.path), directory / file.path, file)


def publish(
    task: AggregateTask, store: Objects, model: ModelRef, cohort: Cohort, base: BaseModel
) -> AggregateManifest:
    """Write the manifest that makes the new model exist; if another attempt was faster, adopt its own."""
    bytes_read = sum(d.bytes_read for d in cohort.usable) + sum(f.reader.bytes_read for f in base.files)
    manifest = AggregateManifest(
        run_key=task.run_key,
        base_model=task.base_model,
        model=model,
        included=[delta.client for delta in cohort.usable],
        excluded=cohort.excluded,
        bytes_read=bytes_read,
    )
    try:
        store.put_new(task.manifest_uri, manifest.canonical_json(), retain=True)
    except ObjectExists:
        return published(task, store)
    return manifest


def published(task: AggregateTask, store: Objects) -> AggregateManifest:
    """The manifest of an earlier attempt."""
    manifest = AggregateManifest.model_validate_json(store.get(task.manifest_uri))
    if (manifest.run_key, manifest.base_model) != (task.run_key, task.base_model):
        raise StageFailure(
            Reason.TASK_INVALID, f"{task.manifest_uri} belongs to another run: {manifest.run_key}"
        )
    return manifest

"""The `aggregate` stage: the clients' deltas combined, and added to the round's base model.

    adopt the model if it is published already       open the base model: its headers, no weights
    which deltas are used? leave bad ones out by name    is the quorum still met?
    make this pod's shards in one pass over their deltas; start again if one proves bad on the way
    the pod with index 0: publish the bundle, then the manifest

Without torch: little memory, no start-up time. Memory depends neither on the model nor on the clients; where
the accepted deltas are the same, so is every byte, with any number of pods and whatever was killed meanwhile.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tributary_api.failures import Reason
from tributary_api.records import AggregateManifest, ProgressMark
from tributary_api.tasks import AggregateTask
from tributary_store.errors import ObjectExists
from tributary_store.objects import Objects
from tributary_worker.aggregation.admission import Admission, Cohort
from tributary_worker.aggregation.base import BaseModel, open_base
from tributary_worker.aggregation.deltas import DeltaRejectedError
from tributary_worker.aggregation.finishing import finish_model
from tributary_worker.aggregation.making import DEFAULT, Maker, Tuning
from tributary_worker.aggregation.methods import MethodPlan, plan_for
from tributary_worker.aggregation.optimizing import earlier_state
from tributary_worker.aggregation.progress import Progress
from tributary_worker.aggregation.shards import shards_of
from tributary_worker.aggregation.strategies import require_deltas
from tributary_worker.aggregation.work import ALONE, CohortChangedError, Pod, Work, bytes_to_read
from tributary_worker.failures import StageFailure
from tributary_worker.store_access import open_store, store_failures
from tributary_worker.task_input import POD_INDEX_ENV, read_task, stage_log


def main(_argv: Sequence[str]) -> int:
    task, log = read_task(AggregateTask), stage_log("aggregate")
    pod = Pod(int(os.environ.get(POD_INDEX_ENV, "0")), task.aggregation.parallelism)
    with tempfile.TemporaryDirectory() as directory, store_failures():
        manifest = aggregate(task, Place(open_store(task.store), Path(directory), log, pod))
    log.info(
        "done", model=manifest.model.uri, included=len(manifest.included), bytes_read=manifest.bytes_read
    )
    return 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a pod does its part."""

    store: Objects
    directory: Path
    """Scratch space."""
    log: Any
    pod: Pod = ALONE
    tuning: Tuning = DEFAULT


def aggregate(task: AggregateTask, place: Place) -> AggregateManifest:
    """Do one pod's part of the task; gives the manifest once it is there.

    Raises StageFailure and StoreError.
    """
    store = place.store
    if store.head(task.manifest_uri) is not None:
        return published(task, store)
    base = open_base(store, task.base_model)
    plan = plan_for(task, base)
    admission = Admission(task, store, plan.expected(), place.log)
    while store.head(task.manifest_uri) is None:
        cohort = admission.cohort()
        try:
            return finished(place, work_on(place, base, plan, admission, cohort))
        except DeltaRejectedError as error:
            admission.exclude(error)
        except CohortChangedError:
            place.log.info("another pod excluded a delta")
    return published(task, store)


def work_on(place: Place, base: BaseModel, plan: MethodPlan, admission: Admission, cohort: Cohort) -> Work:
    task = admission.task
    require_deltas(task.aggregation, len(cohort.deltas))
    shards, pod = shards_of(base, place.tuning.shard_bytes), place.pod
    progress = Progress(place.log, partial(_write_mark, place, admission))
    maker = Maker(
        task=task,
        store=place.store,
        base=base,
        plan=plan,
        deltas=cohort.deltas,
        copies=None,
        tuning=place.tuning,
        directory=place.directory,
        count=progress.count,
    )
    progress.expect(bytes_to_read(maker, shards[pod.index :: pod.count]))
    return Work(
        key=cohort.key(task),
        cohort=cohort,
        admission=admission,
        maker=maker,
        shards=shards,
        pod=pod,
        progress=progress,
        earlier_state=earlier_state(place.store, task),
    )


def _write_mark(place: Place, admission: Admission, percent: int, mark: ProgressMark) -> None:
    uri = admission.records.progress_mark(place.pod.index, percent)
    place.store.put_new(uri, mark.canonical_json())


def finished(place: Place, work: Work) -> AggregateManifest:
    """The work done; the first pod publishes, and the others wait for it: a delta may still prove bad."""
    store, task = place.store, work.maker.task
    records = work.run()
    if place.pod.index:
        work.wait_until(lambda: store.head(task.manifest_uri) is not None, task.manifest_uri)
        return published(task, store)
    model = finish_model(work.maker, work.model_uri, work.shards, records)
    manifest = AggregateManifest(
        run_key=task.run_key,
        base_model=task.base_model,
        model=model,
        included=[delta.client for delta in work.cohort.deltas],
        excluded=list(work.cohort.excluded),
        delta_bytes=sum(delta.manifest.file.size for delta in work.cohort.deltas),
        bytes_read=sum(record.bytes_read for record in records),
        bytes_written=sum(file.size for record in records for file in (record.file, *record.state)),
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

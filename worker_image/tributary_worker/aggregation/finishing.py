"""What makes a model of its shards: index, configuration, tokenizer, the optimizer's memory, the manifest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tributary_api.records import FileDigest, OptimizerState, ShardRecord
from tributary_api.shared import ModelRef
from tributary_api.tasks import AggregateTask
from tributary_store import bundle
from tributary_store.bundle_files import WEIGHTS_INDEX_FILE
from tributary_store.digests import digest_of_bytes, spans
from tributary_store.objects import Objects
from tributary_worker.aggregation.making import Maker
from tributary_worker.aggregation.optimizing import manifest_uri, settings_of
from tributary_worker.aggregation.reader import CheckedReader
from tributary_worker.aggregation.scratch import discard_unfinished
from tributary_worker.aggregation.shards import Shard, index_of
from tributary_worker.aggregation.strategies import server_optimizer_for


def finish_model(
    maker: Maker, model_uri: str, shards: Sequence[Shard], records: Sequence[ShardRecord]
) -> ModelRef:
    """Publish the bundle at `model_uri`, whose weights are there already. Repeating it changes nothing."""
    task, store, base = maker.task, maker.store, maker.base
    files = [record.file for record in records]
    weights = {file.digest.path for file in base.files}
    others = [file for file in base.manifest.files if file.path not in weights]
    if len(shards) > len(base.files):
        index = index_of(shards)
        store.put_new(f"{model_uri}/{WEIGHTS_INDEX_FILE}", index)
        files.append(digest_of_bytes(index, WEIGHTS_INDEX_FILE))
        others = [file for file in others if file.path != WEIGHTS_INDEX_FILE]
    for file in others:
        _copy(store, bundle.file_uri(base.ref, file.path), f"{model_uri}/{file.path}", file)
    ref = bundle.publish(
        store,
        model_uri,
        [*files, *others],
        parents=[task.base_model],
        run_key=task.run_key,
        description=f"round {task.round}",
    )
    _publish_state(task, store, ref, shards, records)
    return ref


def _copy(store: Objects, source: str, target: str, file: FileDigest) -> None:
    """Configuration and tokenizer of the base model."""
    discard_unfinished(store, target)
    reader, upload = CheckedReader(store, source, file), store.begin(target)
    for start, _ in spans(file.size):
        upload.write(reader.chunk(start))
    upload.finish(file.path)


def _publish_state(
    task: AggregateTask,
    store: Objects,
    ref: ModelRef,
    shards: Sequence[Shard],
    records: Sequence[ShardRecord],
) -> None:
    optimizer = server_optimizer_for(task.aggregation)
    if optimizer is None:
        return
    files: Mapping[str, dict[str, FileDigest]] = {
        shard.path: dict(zip(optimizer.slots, record.state, strict=True))
        for shard, record in zip(shards, records, strict=True)
    }
    state = OptimizerState(model_digest=ref.digest, optimizer=settings_of(task), files=dict(files))
    store.put_new(manifest_uri(ref.uri), state.canonical_json(), retain=True)

"""A round that is ready to be aggregated, in a real S3 server: base model, deltas, manifests, its task."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from aggregation_worlds import LAYOUT, RECEIPT_KEY, RUN_KEY, client, delta_manifest, grant_digest
from signers import OWNER_KEY

from tributary_api.aggregation import DeltaEncoding
from tributary_api.records import DeltaManifest, FileDigest
from tributary_api.round import Method
from tributary_api.shared import ModelRef, StoreEndpoint
from tributary_api.tasks import AggregateTask
from tributary_bench.aggregation.cases import Case, ModelShape, Shape
from tributary_dev.s3 import S3Server
from tributary_store import bundle
from tributary_store.bundle_files import CONFIG_FILE, bundle_files
from tributary_store.digests import digest_of_file
from tributary_store.objects import bucket_and_key
from tributary_store.objectstore import ObjectStore
from tributary_store.tensors import encode_header
from tributary_worker.aggregation.norms import l2_norm
from tributary_worker.delta_file import write_delta
from tributary_worker.privacy.keystream import Keystream

WEIGHTS_FILE = "model.safetensors"
CONFIG = b'{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'
ELEMENTS_PER_BLOCK = 2**22
SCALE = 1e-3
ROUNDING_KEY = bytes(32)
FULL = Method.model_validate({"full": {}})


@dataclass(frozen=True, slots=True)
class Delta:
    """A delta in the store, which several clients may deliver."""

    uri: str
    file: FileDigest
    l2_norm: float


@dataclass(frozen=True, slots=True)
class Round:
    """Base model and delta objects of one model in the server."""

    server: S3Server
    store: ObjectStore
    base: ModelRef
    deltas: Mapping[DeltaEncoding, tuple[Delta, ...]]

    @property
    def base_weights_uri(self) -> str:
        return bundle.file_uri(self.base, WEIGHTS_FILE)

    def delivered(self, case: Case) -> list[Delta]:
        """What each client of the case delivers."""
        made = self.deltas[case.encoding]
        return [made[index % len(made)] for index in range(case.clients)]

    def task(self, case: Case) -> AggregateTask:
        """The task of the aggregator, once the clients' manifests are written."""
        return AggregateTask.model_validate(
            {
                "runKey": RUN_KEY,
                "round": {"namespace": "hub", "name": "bench"},
                "baseModel": self.base.to_json_object(),
                "method": FULL.to_json_object(),
                "aggregation": case.settings,
                "deltas": [self._input(*item) for item in enumerate(self.delivered(case))],
                "quorum": case.clients,
                "store": StoreEndpoint(endpoint=self.server.endpoint_for_host).to_json_object(),
                "modelsUri": LAYOUT.models,
                "manifestUri": LAYOUT.aggregate_manifest(RUN_KEY),
            }
        )

    def publish_manifests(self, case: Case) -> None:
        """The manifest of every client; it belongs to one run, so it is written again for each."""
        for index, delta in enumerate(self.delivered(case)):
            manifest = self._manifest(index, delta)
            uri = LAYOUT.delta_manifest(client(name_of(index)), RUN_KEY)
            self.store.put_new(uri, manifest.canonical_json())

    def _manifest(self, index: int, delta: Delta) -> DeltaManifest:
        drawn = delta_manifest(name_of(index), self.base, delta.file)
        return OWNER_KEY.signed(drawn.model_copy(update={"l2_norm": delta.l2_norm, "signature": None}))

    def _input(self, index: int, delta: Delta) -> dict[str, Any]:
        name = name_of(index)
        return {
            "client": client(name).to_json_object(),
            "deltaUri": delta.uri,
            "manifestUri": LAYOUT.delta_manifest(client(name), RUN_KEY),
            "grantDigest": grant_digest(name),
            "receiptKey": RECEIPT_KEY,
            "weight": examples_of(index),
        }


def name_of(index: int) -> str:
    return f"{index:02d}"


def examples_of(index: int) -> int:
    """Declared examples of client number `index`: the weight of its delta."""
    return 1000 * (index + 1)


@contextmanager
def prepared(
    server: S3Server, model: ModelShape, encodings: Iterable[DeltaEncoding], scratch: Path
) -> Iterator[Round]:
    """Base model and deltas in the server's bucket, which is emptied afterwards."""
    server.create_bucket(LAYOUT.bucket)
    endpoint = StoreEndpoint(endpoint=server.endpoint_for_host)
    store = ObjectStore.open(endpoint, server.access_key, server.secret_key)
    try:
        base, weights = _push_base(server, store, model, scratch)
        numbers = range(model.distinct_deltas)
        deltas = {e: tuple(_push_delta(store, model, e, n, scratch) for n in numbers) for e in encodings}
        yield Round(server, store, base, deltas if numbers else {DeltaEncoding.FLOAT32: (weights,)})
    finally:
        delete_objects(server, keep=())


@contextmanager
def cleaned(server: S3Server) -> Iterator[None]:
    """Delete every object that was written in between."""
    before = set(_keys(server))
    try:
        yield
    finally:
        delete_objects(server, keep=before)


def delete_objects(server: S3Server, keep: Iterable[str]) -> None:
    """Empty the bucket but for some keys."""
    client, kept = server.client(), set(keep)
    for key in [key for key in _keys(server) if key not in kept]:
        client.delete_object(Bucket=LAYOUT.bucket, Key=key)


def _keys(server: S3Server) -> Iterator[str]:
    for page in server.client().get_paginator("list_objects_v2").paginate(Bucket=LAYOUT.bucket):
        for item in page.get("Contents", ()):
            yield item["Key"]


def _push_base(
    server: S3Server, store: ObjectStore, model: ModelShape, scratch: Path
) -> tuple[ModelRef, Delta]:
    """The base model, and its weights as if they were a delta: they have the names and shapes of one."""
    directory = scratch / "base"
    directory.mkdir()
    (directory / CONFIG_FILE).write_bytes(CONFIG)
    write_base(directory / WEIGHTS_FILE, model.tensors)
    _put_whole(server, directory)
    ref = bundle.push(store, directory, LAYOUT.models)
    norm = l2_norm(directory / WEIGHTS_FILE, FULL)
    shutil.rmtree(directory)
    file = bundle.weight_files(bundle.read_manifest(store, ref))[0]
    return ref, Delta(bundle.file_uri(ref, WEIGHTS_FILE), file, norm)


def _put_whole(server: S3Server, directory: Path) -> None:
    """The weights in one request, which `push` then finds: in parts they would lie on the disk twice."""
    digest = bundle.bundle_digest(digest_of_file(path) for path in bundle_files(directory))
    ref = ModelRef(uri=LAYOUT.models + digest.removeprefix("sha256:"), digest=digest)
    with (directory / WEIGHTS_FILE).open("rb") as weights:
        key = key_of(bundle.file_uri(ref, WEIGHTS_FILE))
        server.client().put_object(Bucket=LAYOUT.bucket, Key=key, Body=weights)


def _push_delta(
    store: ObjectStore, model: ModelShape, encoding: DeltaEncoding, index: int, scratch: Path
) -> Delta:
    """A delta, written as a client writes its own."""
    uri, path = f"{LAYOUT.clients}shared/{index}.{encoding}", scratch / "delta.safetensors"
    random = _RandomWeights(seed=index + 1)
    trained = {name: random.draw(shape) for name, shape in model.tensors.items()}
    write_delta(path, trained, {}, encoding, Keystream(ROUNDING_KEY))
    try:
        return Delta(uri, store.upload_new(uri, path), l2_norm(path, FULL))
    finally:
        path.unlink()


class _RandomWeights:
    """Small normal numbers, fast: blocks of one draw, each scaled by itself."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._block = self._random.standard_normal(ELEMENTS_PER_BLOCK, dtype=np.float32) * np.float32(SCALE)

    def blocks(self, shape: Shape) -> Iterator[Any]:
        left = prod(shape)
        while left:
            yield self._block[:left] * np.float32(self._random.uniform(0.5, 1.5))
            left -= min(left, ELEMENTS_PER_BLOCK)

    def draw(self, shape: Shape) -> Any:
        return np.concatenate([*self.blocks(shape)]).reshape(shape)


def write_base(path: Path, tensors: dict[str, Shape]) -> None:
    """A safetensors file of float32 weights; of any size, since no tensor is ever whole in memory."""
    random = _RandomWeights(seed=0)
    with path.open("wb") as file:
        file.write(encode_header({name: ("F32", shape) for name, shape in tensors.items()}, {}))
        for shape in tensors.values():
            for block in random.blocks(shape):
                file.write(block.tobytes())


def key_of(uri: str) -> str:
    return bucket_and_key(uri)[1]

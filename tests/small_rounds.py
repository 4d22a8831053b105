"""Rounds of a few hundred weights without torch, and what may happen to their aggregation."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import structlog
from aggregation_worlds import FULL, Round, a_round
from memory_store import MemoryStore, MemoryUpload
from safetensors.numpy import save_file

from tributary_api.aggregation import DeltaEncoding
from tributary_api.records import AggregateManifest, FileDigest
from tributary_store.objects import Bytes
from tributary_worker.aggregate import Place, aggregate
from tributary_worker.aggregation.making import Tuning
from tributary_worker.aggregation.work import Pod
from tributary_worker.delta_file import write_delta
from tributary_worker.privacy.keystream import Keystream

SHAPES = {
    "model.embed_tokens.weight": (37, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 24),
    "model.layers.0.mlp.up_proj.weight": (24, 8),
    "model.layers.0.norm.weight": (8,),
    "model.scale": (1,),
}
MODULES = {"model.layers.0.mlp.down_proj": (24, 8), "model.layers.0.mlp.up_proj": (8, 24)}
LEAVES = ["down_proj", "up_proj"]
PODS_WAIT_SECONDS = 30.0


def lora(*, freeze_a: bool) -> dict[str, Any]:
    return {"lora": {"rank": 3, "alpha": 6, "freezeA": freeze_a, "targetModules": LEAVES}}


def base_model(directory: Path) -> Path:
    """Weights of several types, and one that nothing can be added to."""
    random = np.random.default_rng(11)
    tensors = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    tensors["model.layers.0.norm.weight"] = tensors["model.layers.0.norm.weight"].astype(np.float16)
    directory.mkdir()
    save_file(tensors | {"model.positions": np.arange(9)}, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory


def small_round(
    directory: Path,
    method: Mapping[str, Any] = FULL,
    clients: int = 4,
    encodings: Sequence[DeltaEncoding] = (DeltaEncoding.FLOAT32,),
    seed: int = 0,
    **aggregation: Any,
) -> Round:
    """A round whose i-th client uses the i-th of `encodings`, over and over."""
    made = a_round(base_model(directory / "base"), MODULES, dict(method), clients, seed)
    if method == FULL:
        for delta in made.deltas.values():
            delta.pop("model.positions")
    made = Round(**{**vars_of(made), "aggregation": aggregation})
    for i, name in enumerate(made.weights):
        made.publish(name, encoded(made.deltas[name], encodings[i % len(encodings)]))
    return made


def vars_of(made: Round) -> dict[str, Any]:
    return {name: getattr(made, name) for name in made.__dataclass_fields__}


def encoded(delta: Mapping[str, np.ndarray], encoding: DeltaEncoding) -> bytes:
    with TemporaryDirectory() as directory:
        path = Path(directory, "delta")
        write_delta(path, delta, {}, encoding, Keystream(bytes(32)))
        return path.read_bytes()


def run_pods(made: Round, count: int, tuning: Tuning) -> list[AggregateManifest]:
    """All pods of a Job at the same time."""
    task = made.task

    def run(index: int) -> AggregateManifest:
        with TemporaryDirectory() as directory:
            place = Place(made.store, Path(directory), structlog.get_logger(), Pod(index, count), tuning)
            return aggregate(task, place)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


class KilledError(BaseException):
    """As SIGKILL: nothing that the code says about errors happens."""


@dataclass
class MortalStore(MemoryStore):
    """A store whose client dies at its n-th write, before or after the write has happened."""

    writes_left: int = -1
    dies_after: bool = False
    writes: int = 0
    _dead: bool = False
    _turn: threading.RLock = field(default_factory=threading.RLock)

    def put_new(self, uri: str, data: bytes, *, retain: bool = False) -> bool:
        return self.at_a_write(lambda: MemoryStore.put_new(self, uri, data, retain=retain))

    def begin(self, uri: str) -> MemoryUpload:
        self.at_a_write(lambda: None)
        self.unfinished.append(uri)
        return MortalUpload(self, uri)

    def at_a_write(self, write: Any) -> Any:
        with self._turn:
            self.writes += 1
            if self._dead or (self.writes_left == 0 and not self.dies_after):
                self._dead = True
                raise KilledError
            done = write()
            if self.writes_left == 0:
                self._dead = True
                raise KilledError
            self.writes_left -= 1
            return done

    def revive(self, writes_left: int = -1) -> None:
        self.writes_left, self._dead, self.writes = writes_left, False, 0


@dataclass
class MortalUpload(MemoryUpload):
    def write(self, data: Bytes) -> None:
        assert isinstance(self.store, MortalStore)
        self.store.at_a_write(lambda: MemoryUpload.write(self, data))

    def finish(self, name: str) -> FileDigest:
        # The store counts the object's creation.
        return MemoryUpload.finish(self, name)

    def abort(self) -> None:
        assert isinstance(self.store, MortalStore)
        if not self.store._dead:
            MemoryUpload.abort(self)

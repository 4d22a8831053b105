"""A round that is ready to be aggregated: base model and clients' deltas, in a store of dictionaries."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import structlog
from memory_store import MemoryStore
from safetensors.numpy import load_file, save
from signers import OWNER_KEY

from tributary_api.meta import NamespacedName
from tributary_api.records import AggregateManifest, DeltaManifest, FileDigest
from tributary_api.round import Method
from tributary_api.shared import ModelRef
from tributary_api.tasks import AggregateTask
from tributary_store import bundle
from tributary_store.digests import digest_of_bytes
from tributary_store.errors import ObjectDamaged
from tributary_store.keys import Layout
from tributary_worker.aggregate import Place, aggregate
from tributary_worker.aggregation.making import DEFAULT, Tuning
from tributary_worker.aggregation.norms import l2_norm
from tributary_worker.aggregation.work import ALONE, Pod
from tributary_worker.lora_init import frozen_a

RUN_KEY = "0123456789abcdef0123456789abcdef01234567"
LAYOUT = Layout("exchange")
FROZEN = {"lora": {"rank": 3, "alpha": 6}}
TRAINED_A = {"lora": {"rank": 3, "alpha": 6, "freezeA": False}}
FULL: dict[str, Any] = {"full": {}}
RANK, SCALE = 3, 2.0
RECEIPT_KEY = OWNER_KEY.public

Tensors = dict[str, np.ndarray]


def grant_digest(name: str) -> str:
    return "sha256:" + name.encode().hex().rjust(64, "0")


def client(name: str) -> NamespacedName:
    return NamespacedName(namespace=f"clinic-{name}", name="notes")


@dataclass(frozen=True)
class Round:
    """The store and the task; `deltas` and `weights` by the client's name are what an oracle starts from."""

    store: MemoryStore
    base: ModelRef
    base_directory: Path
    method: Mapping[str, Any]
    modules: Mapping[str, tuple[int, int]]
    deltas: Mapping[str, Tensors]
    weights: Mapping[str, float]
    quorum: int = 1
    aggregation: Mapping[str, Any] = field(default_factory=dict)
    task_kind: str = "CausalLM"

    @property
    def task(self) -> AggregateTask:
        inputs = [
            {
                "client": client(name).to_json_object(),
                "deltaUri": LAYOUT.delta(client(name), RUN_KEY),
                "manifestUri": LAYOUT.delta_manifest(client(name), RUN_KEY),
                "grantDigest": grant_digest(name),
                "receiptKey": RECEIPT_KEY,
                "weight": weight,
            }
            for name, weight in self.weights.items()
        ]
        return AggregateTask.model_validate(
            {
                "runKey": RUN_KEY,
                "round": {"namespace": "hub", "name": "round-1"},
                "baseModel": self.base.to_json_object(),
                "task": self.task_kind,
                "method": self.method,
                "aggregation": self.aggregation,
                "deltas": inputs,
                "quorum": self.quorum,
                "store": {"endpoint": "http://s3.example"},
                "modelsUri": LAYOUT.models,
                "manifestUri": LAYOUT.aggregate_manifest(RUN_KEY),
            }
        )

    def publish(self, name: str, data: bytes | None = None, **changes: Any) -> None:
        """Put a client's delta and manifest into the store, in place of what is there."""
        data = save(self.deltas[name]) if data is None else data
        uri = LAYOUT.delta(client(name), RUN_KEY)
        self.store.objects[uri] = data
        manifest = delta_manifest(name, self.base, digest_of_bytes(data, "delta.safetensors"))
        manifest = manifest.model_copy(update={"l2_norm": norm_of(data, self.method)})
        manifest = OWNER_KEY.signed(manifest.model_copy(update=changes))
        self.store.objects[LAYOUT.delta_manifest(client(name), RUN_KEY)] = manifest.canonical_json()

    def only(self, *names: str) -> Round:
        return replace(self, weights={name: self.weights[name] for name in names})

    def run(self, directory: Path, pod: Pod = ALONE, tuning: Tuning = DEFAULT) -> AggregateManifest:
        directory.mkdir()
        return aggregate(self.task, Place(self.store, directory, structlog.get_logger(), pod, tuning))

    def result(self, directory: Path) -> Path:
        """The directory of the new model, as `tributary model pull` gives it."""
        manifest = self.run(directory / "work")
        bundle.pull(self.store, manifest.model, directory / "new")
        return directory / "new"


def norm_of(data: bytes, method: Mapping[str, Any]) -> float:
    """What an honest client would state; 1 where the data have no norm."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        try:
            return l2_norm(Path(file.name), Method.model_validate(method))
        except (ObjectDamaged, ValueError):
            return 1.0


def delta_manifest(name: str, base: ModelRef, file: FileDigest) -> DeltaManifest:
    manifest = DeltaManifest.model_validate(
        {
            "runKey": RUN_KEY,
            "client": client(name).to_json_object(),
            "baseModelDigest": base.digest,
            "file": file.to_json_object(),
            "l2Norm": 1.0,
            "receipt": {
                "grantDigest": grant_digest(name),
                "mechanism": {
                    "numExamples": 100,
                    "expectedBatchSize": 10,
                    "batchCap": 20,
                    "steps": 1,
                    "noiseMultiplier": 1.0,
                    "maxGradNorm": 1.0,
                },
                "epsilon": "1",
                "delta": "1e-6",
                "selfTest": {"plantedRecordRatio": 1.0, "noiseStdRatio": 1.0, "trainableParameters": 1},
            },
        }
    )
    return OWNER_KEY.signed(manifest)


def tensors_of(directory: Path) -> Tensors:
    """Every stored weight of a model directory."""
    return {
        name: t for file in sorted(directory.glob("*.safetensors")) for name, t in load_file(file).items()
    }


def a_round(
    base_directory: Path,
    modules: Mapping[str, tuple[int, int]],
    method: Mapping[str, Any] = FROZEN,
    clients: int = 3,
    seed: int = 0,
) -> Round:
    """`modules`: (inputs, outputs) of every layer with an adapter, by its name in the running model."""
    store, random = MemoryStore(), np.random.default_rng(seed)
    base = bundle.push(store, base_directory, LAYOUT.models)
    names = [chr(ord("a") + i) for i in range(clients)]
    deltas = {name: _delta(method, modules, base_directory, random) for name in names}
    weights = {name: float(random.integers(100, 20000)) for name in names}
    made = Round(store, base, base_directory, method, modules, deltas, weights)
    for name in names:
        made.publish(name)
    return made


def _delta(
    method: Mapping[str, Any],
    modules: Mapping[str, tuple[int, int]],
    base_directory: Path,
    random: np.random.Generator,
) -> Tensors:
    def noise(*shape: int) -> np.ndarray:
        return (0.05 * random.standard_normal(shape)).astype(np.float32)

    if method == FULL:
        return {name: noise(*tensor.shape) for name, tensor in tensors_of(base_directory).items()}
    delta = {}
    for module, (inputs, outputs) in modules.items():
        is_frozen = method["lora"].get("freezeA", True)
        a = frozen_a(RUN_KEY, module, RANK, inputs) if is_frozen else noise(RANK, inputs)
        delta[f"base_model.model.{module}.lora_A.weight"] = a
        delta[f"base_model.model.{module}.lora_B.weight"] = noise(outputs, RANK)
    return delta

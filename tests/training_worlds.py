"""A client, its data, its grant and its ledger around the `train` stage, in a store of dictionaries."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tiny_models
from memory_store import MemoryStore
from signers import HUB_KEY, OWNER_KEY, TENANT_SECRET

from tributary_accounting.ledger import Ledger
from tributary_accounting.mechanism import dp_sgd
from tributary_api.client import FederatedClient
from tributary_api.meta import NamespacedName
from tributary_api.records import Grant, computation_digest
from tributary_api.round import Method, Training
from tributary_api.shared import ModelRef, TaskKind
from tributary_api.tasks import TrainTask
from tributary_store import bundle
from tributary_store.keys import Layout
from tributary_worker.data import files_of
from tributary_worker.train import Surroundings

NOW = datetime(2026, 6, 1, tzinfo=UTC)
CLIENT = NamespacedName(namespace="clinic-a", name="notes")
RUN_KEY = "0123456789abcdef0123456789abcdef01234567"
TENANT_KEY = TENANT_SECRET
RECEIPT_KEY = OWNER_KEY.public
NOWHERE = ModelRef(uri="s3://exchange/models/0", digest="sha256:" + "0" * 64)
STEPS, BATCH, DECLARED = 3, 8, 40
NOISE_MULTIPLIER = 1.0
"""Costs about epsilon 2 at delta 1e-3, well below the 4 that are granted."""


def client_object(**spec: Any) -> FederatedClient:
    base = {
        "data": {
            "name": "notes",
            "uri": "s3://data/notes/",
            "format": "jsonl",
            "numExamples": DECLARED,
            "holdoutFraction": "0.1",
        },
        "store": {"endpoint": "http://s3.example"},
        "consent": {"hubs": [{"namespace": "hub"}], "expires": "2027-01-01T00:00:00Z"},
        "privacy": {
            "budget": {"epsilon": "8", "delta": "1e-3"},
            "maxRoundEpsilon": "4",
            "ledgerUri": "s3://own/ledger/",
        },
        "worker": {"allowedImages": ["worker@sha256:" + "0" * 64]},
    }
    return FederatedClient.model_validate(
        {"metadata": {"name": CLIENT.name, "namespace": CLIENT.namespace}, "spec": base | spec}
    )


def train_task(model: ModelRef, client: FederatedClient, **changes: Any) -> TrainTask:
    layout = Layout("exchange")
    task = {
        "baseModel": model.to_json_object(),
        "task": "CausalLM",
        "method": {"lora": {"rank": 4, "alpha": 8}},
        "training": {
            "maxSteps": STEPS,
            "expectedBatchSize": BATCH,
            "microBatchSize": 4,
            "learningRate": "1e-2",
            "maxSequenceLength": 16,
        },
        "data": client.spec.data.to_json_object(),
        "ledgerUri": client.spec.privacy.ledger_uri,
        "store": {"endpoint": "http://s3.example"},
        "deltaUri": layout.delta(CLIENT, RUN_KEY),
        "manifestUri": layout.delta_manifest(CLIENT, RUN_KEY),
    }
    for name, change in changes.items():
        task[name] = task[name] | change if name in ("training", "data") else change
    grant = grant_of(task)
    signed = {"grant": grant.to_json_object(), "grantSignature": HUB_KEY.sign(grant).to_json_object()}
    return TrainTask.model_validate({**signed, **task})


def grant_of(task: dict[str, Any]) -> Grant:
    """What the hub grants for this task."""
    method, training = Method.model_validate(task["method"]), Training.model_validate(task["training"])
    return Grant(
        run_key=RUN_KEY,
        hub_namespace="hub",
        round_name="round-1",
        client=CLIENT,
        data_name="notes",
        base_model_digest=task["baseModel"]["digest"],
        mechanism=dp_sgd(DECLARED, BATCH, STEPS, NOISE_MULTIPLIER, max_grad_norm=0.5),
        epsilon="4",
        delta="1e-3",
        delta_uri=task["deltaUri"],
        computation=computation_digest(method, training, TaskKind(task["task"])),
    )


@dataclass
class World:
    """Everything that a training reaches, and the task."""

    store: MemoryStore
    client: FederatedClient
    task: TrainTask

    @property
    def ledger(self) -> Ledger:
        data_set = NamespacedName(namespace=CLIENT.namespace, name=self.client.spec.data.name)
        return Ledger(self.store, self.task.ledger_uri, data_set, lambda: NOW)

    @property
    def surroundings(self) -> Surroundings:
        return Surroundings(
            store=self.store,
            files=files_of(self.task.data, self.store, Path("/nonexistent")),
            client=lambda: self.client,
            tenant_key=TENANT_KEY,
            now=lambda: NOW,
        )

    def reserve(self) -> World:
        self.ledger.reserve(self.task.grant, self.client.spec.privacy.budget)
        return self


def records(count: int) -> list[str]:
    return [json.dumps({"text": f"record number {i} says {i * i} things"}) for i in range(count)]


def world(directory: Path, model: Any = None, lines: list[str] | None = None, **changes: Any) -> World:
    """A world in which the task may run: model pushed, data there, grant reserved."""
    store = MemoryStore()
    saved = tiny_models.save(model or tiny_models.llama(width=32), directory)
    ref = bundle.push(store, saved, "s3://exchange/models/")
    text = "\n".join(records(60) if lines is None else lines)
    store.put_new("s3://data/notes/part-0.jsonl", text.encode())
    declared = client_object().spec.data.to_json_object() | changes.pop("data", {})
    client = client_object(data=declared)
    return World(store, client, train_task(ref, client, **changes)).reserve()

"""The kubelet and the worker image in one: takes our pending pods, writes the real records, ends them.

It publishes through the same store, ledger and contract code as the image; only the arithmetic is left out.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from kube import Kubectl, Object, Refused
from signers import OWNER_KEY

from tributary_accounting.ledger import Ledger
from tributary_api.base import sha256_of
from tributary_api.failures import EXIT_CODES, Reason, TerminationMessage
from tributary_api.meta import NamespacedName
from tributary_api.records import (
    AggregateManifest,
    CompressionManifest,
    DeltaManifest,
    EvaluationReport,
    GateVerdict,
    ModelScore,
    Receipt,
    SelfTestFigures,
)
from tributary_api.shared import ModelRef
from tributary_api.tasks import TASK_ENV, AggregateTask, CompressTask, EvaluateTask, GateTask, TrainTask
from tributary_operator import names
from tributary_store import bundle
from tributary_store.digests import digest_of_bytes
from tributary_store.objectstore import ObjectStore

LOOK_SECONDS = 0.3
FINAL_PHASES = {"Succeeded", "Failed"}
OUT_OF_MEMORY_EXIT_CODE = 137

Ending = Object
"""`state.terminated` of a container."""

SUCCESS: Ending = {"exitCode": 0, "reason": "Completed"}
OUT_OF_MEMORY: Ending = {"exitCode": OUT_OF_MEMORY_EXIT_CODE, "reason": "OOMKilled"}
CRASH: Ending = {"exitCode": 1, "reason": "Error", "message": "Traceback"}
HANG: Ending = {}
"""The pod goes on running."""


def failing(reason: Reason, *, retryable: bool = False) -> Ending:
    message = TerminationMessage(reason=reason, message="said by the worker", retryable=retryable)
    return {
        "exitCode": EXIT_CODES[reason],
        "reason": "Error",
        "message": message.model_dump_json(by_alias=True),
    }


def tiny_bundle(store: ObjectStore, models_uri: str, seed: str) -> ModelRef:
    """A bundle of four weights that the seed decides; equal seeds give equal bundles."""
    header = b'{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}'
    with TemporaryDirectory() as place:
        directory = Path(place)
        (directory / "config.json").write_text('{"model_type": "gpt2", "n_embd": 8, "n_layer": 2}')
        weights = hashlib.sha256(seed.encode()).digest()[:16]
        (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + weights)
        return bundle.push(store, directory, models_uri)


@dataclass
class WorkerDouble:
    """Runs until `stop`. By default every worker succeeds; `plan` holds other endings, used up one by one."""

    kubectl: Kubectl
    store: ObjectStore
    namespaces: list[str]
    verdicts: deque[str] = field(default_factory=deque)
    """Of the next gates; PASS when there is none left."""
    plan: dict[str, deque[Ending]] = field(default_factory=dict)
    """Endings by `<namespace>/<stage>`."""
    started: Counter[str] = field(default_factory=Counter)
    """Pods that were taken, by `<namespace>/<stage>`."""
    _taken: set[str] = field(default_factory=set)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> WorkerDouble:
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def will(self, namespace: str, *endings: Ending, stage: str = names.TRAIN) -> None:
        self.plan[f"{namespace}/{stage}"] = deque(endings)

    def _live(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            for namespace in self.namespaces:
                for pod in self._pods(namespace):
                    self._take(pod)

    def _pods(self, namespace: str) -> list[Object]:
        found = self.kubectl.get("pods", "-n", namespace, f"-l{names.STAGE}")
        pods: list[Object] = found["items"]
        return [pod for pod in pods if self._is_new(pod)]

    def _is_new(self, pod: Object) -> bool:
        is_over = pod["status"].get("phase") in FINAL_PHASES or "deletionTimestamp" in pod["metadata"]
        return not is_over and pod["metadata"]["uid"] not in self._taken

    def _take(self, pod: Object) -> None:
        key = f"{pod['metadata']['namespace']}/{pod['metadata']['labels'][names.STAGE]}"
        self._taken.add(pod["metadata"]["uid"])
        self.started[key] += 1
        endings = self.plan.get(key)
        usual = HANG if key.endswith(f"/{names.SERVE}") else SUCCESS
        ending = endings.popleft() if endings else usual
        try:
            self._end(pod, ending)
        except Refused as refused:
            if "not found" not in str(refused):  # deleted meanwhile, as happens to pods
                raise

    def _end(self, pod: Object, ending: Ending) -> None:
        if ending == SUCCESS:
            self._work(pod)
        phase = "Running" if ending == HANG else "Succeeded" if ending == SUCCESS else "Failed"
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        state = {"running": {"startedAt": now}}
        if ending != HANG:
            state = {"terminated": {**ending, "startedAt": now, "finishedAt": now}}
        container = {"name": "worker", "image": "", "imageID": "", "ready": ending == HANG, "restartCount": 0}
        conditions = [{"type": "Ready", "status": "True" if ending == HANG else "False"}]
        status = {
            "phase": phase,
            "conditions": conditions,
            "containerStatuses": [{**container, "state": state}],
        }
        self._patch(pod, {"status": status})

    def _patch(self, pod: Object, change: Object) -> None:
        metadata = pod["metadata"]
        where = ["-n", metadata["namespace"], metadata["name"], "--subresource=status", "--type=merge"]
        self.kubectl("patch", "pod", *where, "-p", json.dumps(change))

    def _work(self, pod: Object) -> None:
        (container,) = pod["spec"]["containers"]
        text = next(e["value"] for e in container["env"] if e["name"] == TASK_ENV)
        stages: dict[str, Callable[[str], None]] = {
            names.TRAIN: self._train,
            names.AGGREGATE: self._aggregate,
            names.EVALUATE: self._evaluate,
            names.COMPRESS: self._compress,
            names.GATE: self._gate,
        }
        stages[container["args"][0]](text)

    def _train(self, text: str) -> None:
        task = TrainTask.model_validate_json(text)
        grant = task.grant
        data_set = NamespacedName(namespace=grant.client.namespace, name=grant.data_name)
        ledger = Ledger(self.store, task.ledger_uri, data_set, lambda: datetime.now(UTC))
        ledger.launch(grant, OWNER_KEY.public)
        delta = f"delta of {grant.client}".encode()
        self.store.put_new(task.delta_uri, delta)
        figures = SelfTestFigures(planted_record_ratio=1.0, noise_std_ratio=1.0, trainable_parameters=8)
        receipt = Receipt(
            grant_digest=grant.digest,
            mechanism=grant.mechanism,
            epsilon=grant.epsilon,
            delta=grant.delta,
            self_test=figures,
        )
        file = digest_of_bytes(delta, "delta.safetensors")
        manifest = DeltaManifest(
            run_key=grant.run_key,
            client=grant.client,
            base_model_digest=grant.base_model_digest,
            file=file,
            l2_norm=1.0,
            receipt=receipt,
        )
        self.store.put_new(task.manifest_uri, OWNER_KEY.signed(manifest).canonical_json(), retain=True)

    def _aggregate(self, text: str) -> None:
        task = AggregateTask.model_validate_json(text)
        included = [delta.client for delta in task.deltas]
        manifest = AggregateManifest(
            run_key=task.run_key,
            base_model=task.base_model,
            model=tiny_bundle(self.store, task.models_uri, seed=repr((task.run_key, included))),
            included=included,
            delta_bytes=1,
            bytes_read=1,
            bytes_written=1,
        )
        self.store.put_new(task.manifest_uri, manifest.canonical_json(), retain=True)

    def _evaluate(self, text: str) -> None:
        task = EvaluateTask.model_validate_json(text)
        losses = {"baseline": 2.5, "new": 2.25}
        scores = [
            ModelScore(
                role=scored.role,
                model=scored.model,
                loss=losses[scored.role],
                perplexity=9.0,
                accuracy=0.5,
                documents=1,
                tokens=9,
            )
            for scored in task.models
        ]
        report = EvaluationReport(task=task.task, dataset_digest=task.dataset.digest, scores=scores)
        self.store.put_new(task.report_uri, report.canonical_json(), retain=True)

    def _compress(self, text: str) -> None:
        task = CompressTask.model_validate_json(text)
        digest = sha256_of(f"compressed {task.model.digest}".encode())
        manifest = CompressionManifest(
            parent=task.model,
            model=ModelRef(uri=f"{task.releases_uri}{digest.removeprefix('sha256:')}", digest=digest),
            bytes=100,
            parent_bytes=400,
        )
        self.store.put_new(task.manifest_uri, manifest.canonical_json(), retain=True)

    def _gate(self, text: str) -> None:
        task = GateTask.model_validate_json(text)
        verdict = self.verdicts.popleft() if self.verdicts else "PASS"
        models = {"candidate": task.candidate, "parent": task.parent, "stable": task.stable}
        scores = [
            ModelScore(role=role, model=model, loss=3.0, perplexity=20.0, accuracy=0.4, documents=1, tokens=9)
            for role, model in models.items()
            if model is not None
        ]
        reason = "NoWorse" if verdict == "PASS" else "Worse"
        found = GateVerdict.model_validate(
            {"verdict": verdict, "reason": reason, "scores": scores, "comparisons": []}
        )
        self.store.put_new(task.verdict_uri, found.canonical_json(), retain=True)

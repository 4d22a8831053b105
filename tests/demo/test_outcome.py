"""The summary's numbers come from records and statuses; what is missing is an error, not a zero."""

from __future__ import annotations

from typing import Any

import pytest
from demo_objects import CLIENT, ROUND
from memory_store import MemoryStore

from docstrings_demo import outcome
from docstrings_demo.observe import Load, Pod, Seen
from docstrings_demo.problems import DemoError
from tributary_api.client import FederatedClient
from tributary_api.meta import NamespacedName
from tributary_api.records import DeltaManifest, GateVerdict
from tributary_api.release import Revision
from tributary_api.round import FederatedRound
from tributary_operator import names

DIGEST = "sha256:" + "0" * 64


def model(digit: str) -> dict[str, str]:
    return {"uri": f"s3://tributary/models/{digit * 64}", "digest": "sha256:" + digit * 64}


def a_round() -> FederatedRound:
    metrics = [{"name": "baselineLoss", "value": "5.8"}, {"name": "loss", "value": "5.7"}]
    return FederatedRound.model_validate({**ROUND, "status": {"metrics": metrics}})


def delta_manifest(run_key: str) -> dict[str, Any]:
    mechanism = {
        "numExamples": 10,
        "expectedBatchSize": 4,
        "batchCap": 10,
        "steps": 10,
        "noiseMultiplier": 1.0,
        "maxGradNorm": 0.1,
    }
    receipt = {
        "grantDigest": DIGEST,
        "mechanism": mechanism,
        "epsilon": "1.98",
        "delta": "1e-5",
        "selfTest": {"plantedRecordRatio": 1.0, "noiseStdRatio": 1.0, "trainableParameters": 5},
    }
    return {
        "runKey": run_key,
        "client": {"namespace": "algebra", "name": "docstrings"},
        "baseModelDigest": DIGEST,
        "file": {"path": "delta.safetensors", "size": 1, "chunks": [DIGEST]},
        "l2Norm": 1.0,
        "receipt": receipt,
    }


def verdict(candidate: str, parent: str) -> GateVerdict:
    numbers = {"perplexity": 1.0, "accuracy": 0.5, "documents": 2, "tokens": 10}
    scores = [
        {"role": "candidate", "model": model(candidate), "loss": 5.71, **numbers},
        {"role": "parent", "model": model(parent), "loss": 5.7, **numbers},
    ]
    fields = {"verdict": "PASS", "reason": "NoWorse", "scores": scores, "comparisons": []}
    return GateVerdict.model_validate(fields)


def seen(*phases: str) -> Seen:
    fedround = a_round()
    pods = [
        Pod("algebra", f"p{i}", names.TRAIN, fedround.run_key, "docstrings", i, phase)
        for i, phase in enumerate(phases)
    ]
    return Seen([FederatedClient.model_validate(CLIENT)], [fedround], [], pods)


def test_epsilon_is_the_receipts_and_pods_are_those_that_succeeded() -> None:
    store = MemoryStore()
    client = NamespacedName(namespace="algebra", name="docstrings")
    written = a_round()
    manifest = DeltaManifest.model_validate(delta_manifest(written.run_key))
    store.put_new(outcome.LAYOUT.delta_manifest(client, written.run_key), manifest.canonical_json())
    found = outcome.round_summary(store, seen("Succeeded", "Failed", "Succeeded"), written)
    assert (found.loss_before, found.loss_after) == (5.8, 5.7)
    assert [(c.namespace, c.epsilon, c.pods) for c in found.clients] == [("algebra", 1.98, 2)]


def test_a_round_without_an_evaluation_is_an_error() -> None:
    with pytest.raises(DemoError, match="baselineLoss"):
        outcome.metric([], "baselineLoss")


def test_a_release_takes_its_losses_from_the_verdict_about_its_own_model() -> None:
    revision = Revision.model_validate(
        {"revision": "b", "model": model("b"), "parent": model("a"), "bytes": 30, "parentBytes": 100}
    )
    found = outcome.release_summary(revision, [verdict("c", "a"), verdict("b", "a")])
    assert (found.digest, found.loss, found.parent_loss, found.gate) == (
        model("b")["digest"],
        5.71,
        5.7,
        "PASS",
    )
    with pytest.raises(DemoError, match="no verdict"):
        outcome.release_summary(revision, [verdict("c", "a")])


def test_the_counters_are_passed_on_as_they_are() -> None:
    load = Load(sent=7, failed=1, per_release=(("assistant/b", 6),))
    empty = Seen([], [], [], [])
    found = outcome.summary(MemoryStore(), empty, load, 12.34)
    assert found.requests.model_dump() == {"sent": 7, "failed": 1, "per_release": {"assistant/b": 6}}
    assert found.seconds == 12.3


def test_budgets_are_what_the_ledger_says() -> None:
    assert [b.model_dump() for b in outcome.budgets(seen())] == [
        {"namespace": "algebra", "spent": 4.2, "budget": 20.0}
    ]

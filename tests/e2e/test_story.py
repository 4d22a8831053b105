"""A hub and its data owners: a round with owners in trouble, the same again, a model in service, farewell.

The tests of this file are chapters: each goes on from where the one before it ended.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TypeVar

import httpx
import pytest
from installation import HUB, SYSTEM
from kube import Object, Refused
from story import CLIENT, GOOD, OWNERS, Story

T = TypeVar("T")

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

ROUND: Object = {
    "apiVersion": "tributary.dev/v1alpha1",
    "kind": "FederatedRound",
    "metadata": {"name": "first", "namespace": HUB},
    "spec": {
        "clients": {"namespaceSelector": {"matchLabels": {"story": "yes"}}, "minAvailable": 2},
        "method": {"lora": {"rank": 4, "alpha": 8}},
        "training": {
            "maxSteps": 3,
            "expectedBatchSize": 32,
            "microBatchSize": 8,
            "learningRate": "0.01",
            "maxSequenceLength": 48,
        },
        "privacy": {"epsilon": "8", "delta": "1e-5", "maxGradNorm": "0.5"},
        "clientBackoffLimit": 0,
    },
}
RELEASE: Object = {
    "apiVersion": "tributary.dev/v1alpha1",
    "kind": "ModelRelease",
    "metadata": {"name": "assistant", "namespace": HUB},
    "spec": {
        "model": {"roundRef": {"name": "first"}},
        "compression": [{"quantize": {"scheme": "Int8"}}],
        "serving": {
            "serviceName": "assistant",
            "maxSequenceLength": 128,
            "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "2Gi"}},
        },
        "strategy": {"blueGreen": {"scaleDownDelaySeconds": 5, "postPromotion": {"analysisSeconds": 3}}},
    },
}


def a_round(story: Story, name: str = "first", **spec: object) -> Object:
    changed = {"baseModel": story.base_model, "evaluation": {"dataset": story.dataset}, **spec}
    return {**ROUND, "metadata": {**ROUND["metadata"], "name": name}, "spec": {**ROUND["spec"], **changed}}


def wait_for(story: Story, what: str, condition: str, seconds: int = 600) -> Object:
    try:
        story.kubectl("wait", "-n", HUB, what, f"--for={condition}", f"--timeout={min(seconds, 110)}s")
    except Refused as late:
        if seconds > 110 and "timed out" in str(late):
            return wait_for(story, what, condition, seconds - 110)
        described = story.kubectl("describe", "-n", HUB, what)
        pytest.fail(f"{late}\n{described}\n{story.kubectl('get', 'jobs,pods,tributary', '-A')}")
    return story.kubectl.get("-n", HUB, what)


def budgets(story: Story) -> dict[str, Object]:
    """status.privacy of every owner's client."""
    items = {owner: story.kubectl.get("-n", owner, f"federatedclient/{CLIENT}") for owner in OWNERS}
    return {owner: item["status"]["privacy"] for owner, item in items.items()}


def when(look: Callable[[], T], is_so: Callable[[T], bool], seconds: int = 60) -> T:
    """What `look` gives once it is so, or at the end of the time."""
    deadline = time.monotonic() + seconds
    while not is_so(seen := look()) and time.monotonic() < deadline:
        time.sleep(2)
    return seen


def jobs_ever_started(story: Story) -> set[str]:
    return {job["metadata"]["uid"] for job in story.kubectl.get("jobs", "-A")["items"]}


def test_a_round_completes_without_the_owners_in_trouble(story: Story):
    story.kubectl.create(a_round(story))
    done = wait_for(story, "federatedround/first", "condition=Complete")
    status = done["status"]
    assert status["clientsSummary"] == "2/4"
    reasons = {failure["client"]: failure["reason"] for failure in status["failedClients"]}
    assert reasons == {f"silent/{CLIENT}": "DataEmpty", f"hungry/{CLIENT}": "OOMKilled"}
    metrics = {metric["name"]: float(metric["value"]) for metric in status["metrics"]}
    assert metrics["loss"] != metrics["baselineLoss"]
    assert status["model"]["digest"] != story.base_model["digest"]


def test_owners_are_charged_for_what_was_launched_and_can_see_it(story: Story):
    clients = when(
        lambda: budgets(story),
        lambda all_: not any(float(c["reservedEpsilon"] or "1") for c in all_.values()),
    )
    for owner in GOOD:
        assert 7.5 < float(clients[owner]["spentEpsilon"]) <= 8.0
        assert float(clients[owner]["remainingEpsilon"]) == pytest.approx(1, abs=0.5)
    # Killed while it imported torch: it never launched, so its budget is given back.
    assert float(clients["hungry"]["spentEpsilon"]) == 0
    assert "Spent" in story.kubectl("get", "federatedclients", "-A").splitlines()[0].title()


def test_nothing_private_is_in_logs_events_or_status(story: Story):
    """Text of a record, or its loss, would be there if anything had printed it."""
    texts = [story.kubectl("get", "events,federatedrounds,federatedclients,jobs", "-A", "-ojson")]
    for owner in GOOD:
        pods = story.kubectl.get("pods", "-n", owner)["items"]
        texts += [story.kubectl("logs", "-n", owner, pod["metadata"]["name"]) for pod in pods]
    everything = "\n".join(texts)
    assert "this line is no JSON" not in everything
    assert "grad_norm" not in everything
    assert not [line for line in everything.splitlines() if '"loss"' in line and '"name"' not in line]


def test_a_finished_round_that_is_applied_again_starts_nothing(story: Story):
    before = story.kubectl.get("-n", HUB, "federatedround/first")
    story.kubectl("delete", "-n", HUB, "federatedround/first", "--timeout=90s")
    started = jobs_ever_started(story)
    story.kubectl.create(a_round(story))
    again = wait_for(story, "federatedround/first", "condition=Complete", 60)
    assert again["status"]["model"] == before["status"]["model"]
    assert again["status"]["runKey"] == before["status"]["runKey"]
    assert jobs_ever_started(story) <= started


def test_a_round_that_no_budget_affords_starts_nothing(story: Story):
    clients = {**ROUND["spec"]["clients"], "minAvailable": 3}
    started = jobs_ever_started(story)
    story.kubectl.create(a_round(story, "second", clients=clients))
    stalled = wait_for(story, "federatedround/second", "condition=Stalled", 120)
    reasons = {failure["client"]: failure["reason"] for failure in stalled["status"]["failedClients"]}
    assert {reasons[f"{owner}/{CLIENT}"] for owner in GOOD} == {"BudgetExceeded"}
    assert jobs_ever_started(story) <= started
    story.kubectl("delete", "-n", HUB, "federatedround/second", "--timeout=90s")


def test_the_model_goes_live_compressed(story: Story):
    gate = {"dataset": story.dataset, "metrics": [{"name": "loss", "margin": "0.05"}]}
    story.kubectl.create({**RELEASE, "spec": {**RELEASE["spec"], "gate": gate}})
    live = wait_for(story, "modelrelease/assistant", "condition=Ready")
    stable = live["status"]["stable"]
    assert stable["bytes"] < 0.6 * stable["parentBytes"]
    service = story.kubectl.get("-n", HUB, "service/assistant")
    url = f"http://{service['spec']['clusterIP']}:{service['spec']['ports'][0]['port']}/v1/completions"
    # The Service is seconds old: kube-proxy may not have its rules yet.
    with httpx.Client(transport=httpx.HTTPTransport(retries=6), timeout=60) as client:
        answer = client.post(url, json={"model": "assistant", "prompt": "Return the", "max_tokens": 4})
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-tributary-release"] == f"assistant/{stable['revision']}"
    assert answer.json()["usage"]["completion_tokens"] >= 1


def test_a_stranger_can_see_where_things_stand(story: Story):
    listing = story.kubectl("get", "tributary", "-A")
    assert all(kind in listing for kind in ("federatedclient", "federatedround", "modelrelease"))
    described = story.kubectl("describe", "-n", HUB, "federatedround", "first")
    assert "RoundComplete" in described
    events = json.loads(story.kubectl("get", "events", "-n", HUB, "-ojson"))["items"]
    ours = [event for event in events if event["involvedObject"]["kind"].startswith("Federated")]
    assert ours
    assert len(ours) <= 40, "events tell of transitions, not of passes"


def test_a_tenant_can_leave_when_the_operator_is_gone(story: Story):
    story.kubectl("delete", "modelrelease", "-n", HUB, "--all", "--timeout=90s")
    story.kubectl("delete", "federatedround", "-n", HUB, "--all", "--timeout=90s")
    story.kubectl("scale", "-n", SYSTEM, "deployment", "--all", "--replicas=0")
    story.kubectl("delete", "namespace", "north", "--timeout=110s")

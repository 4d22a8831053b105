"""The Lease on the real API server: its rules, and two operators that hand over to each other."""

from __future__ import annotations

import json
import secrets
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Protocol

import pytest
from installation import HUB, SYSTEM
from kube import Kubectl, eventually
from lease_server import LeaseServer
from operator_process import OperatorProcess, operator_kubeconfig

from tributary_api.base import API_VERSION
from tributary_dev import cluster as dev
from tributary_operator import names
from tributary_operator.api import Api, Conflict, Forbidden, Invalid, JsonObject, Missing
from tributary_operator.kinds import LEASE

pytestmark = pytest.mark.cluster

PATH = LEASE.path(SYSTEM, names.LEASE)
FAIL_OVER_SECONDS_MAX = 20
STALLED_SECONDS_MAX = 10
"""From the Lease to the first status that the new leader writes."""


class Server(Protocol):
    async def request(self, verb: str, path: str, *, body: JsonObject | None = None) -> JsonObject: ...


class Doubled:
    """`LeaseServer` without the road."""

    def __init__(self) -> None:
        self.server = LeaseServer()

    async def request(self, verb: str, path: str, *, body: JsonObject | None = None) -> JsonObject:
        return self.server.answer(verb, body)


@pytest.fixture
def kubeconfig(installed: Kubectl, tmp_path: Path) -> Path:
    return operator_kubeconfig(installed, tmp_path / "kubeconfig")


@pytest.fixture
def no_lease(installed: Kubectl) -> None:
    installed("delete", "lease", names.LEASE, "-n", SYSTEM, "--ignore-not-found")


@pytest.fixture(params=["double", "real"])
async def server(
    request: pytest.FixtureRequest, kubeconfig: Path, no_lease: None, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Server]:
    if request.param == "double":
        yield Doubled()
        return
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    api = await Api.connect(10)
    yield api  # type: ignore[misc]
    await api.close()


def lease(holder: str, version: str | None = None, name: str = names.LEASE) -> JsonObject:
    metadata = {"name": name, "namespace": SYSTEM}
    return {
        "apiVersion": LEASE.api_version,
        "kind": LEASE.kind,
        "metadata": metadata if version is None else {**metadata, "resourceVersion": version},
        "spec": {"holderIdentity": holder, "leaseDurationSeconds": 12},
    }


async def test_double_and_server_keep_the_same_rules(server: Server) -> None:
    with pytest.raises(Missing):
        await server.request("GET", PATH)
    first = await server.request("PUT", PATH, body=lease("a"))
    version = first["metadata"]["resourceVersion"]
    with pytest.raises(Invalid):
        await server.request("PUT", PATH, body=lease("b"))
    renewed = {**first, "spec": {**first["spec"], "leaseDurationSeconds": 13}}
    second = await server.request("PUT", PATH, body=renewed)
    with pytest.raises(Conflict):
        await server.request("PUT", PATH, body=lease("b", version))
    found = await server.request("GET", PATH)
    assert found["spec"]["holderIdentity"] == "a"
    assert found["metadata"]["resourceVersion"] == second["metadata"]["resourceVersion"] != version
    released = await server.request("PUT", PATH, body=lease("", second["metadata"]["resourceVersion"]))
    assert not released["spec"].get("holderIdentity")


async def test_renewing_a_lease_that_is_gone_makes_it_anew(server: Server) -> None:
    made = await server.request("PUT", PATH, body=lease("a", "1"))
    assert made["spec"]["holderIdentity"] == "a"


async def test_the_operator_has_no_other_lease(
    kubeconfig: Path, installed: Kubectl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    api = await Api.connect(10)
    with pytest.raises(Forbidden):
        await api.request("PUT", LEASE.path(SYSTEM, "another"), body=lease("a", name="another"))
    await api.close()


class Pair:
    """Two operators, and which of them leads."""

    def __init__(self, kubectl: Kubectl, first: OperatorProcess, second: OperatorProcess) -> None:
        self.kubectl, self.both = kubectl, (first, second)

    def leader(self) -> OperatorProcess | None:
        leading = [p for p in self.both if p.is_running and self._says_that_it_leads(p)]
        assert len(leading) <= 1, "two operators lead"
        return leading[0] if leading else None

    @staticmethod
    def _says_that_it_leads(process: OperatorProcess) -> bool:
        with urllib.request.urlopen(f"{process.url}/readyz", timeout=5) as answer:
            return bool(json.load(answer)["leads"])

    def in_order(self) -> tuple[OperatorProcess, OperatorProcess]:
        eventually(lambda: self.leader() is not None)
        leader = self.leader()
        assert leader is not None
        return leader, next(p for p in self.both if p is not leader)

    def seconds_until_leads(self, process: OperatorProcess) -> float:
        start = time.monotonic()
        eventually(lambda: self.leader() is process, timeout_seconds=FAIL_OVER_SECONDS_MAX)
        return time.monotonic() - start

    def tells_of_a_round(self) -> None:
        """Whoever leads writes the status of a new round."""
        name = f"told-{secrets.token_hex(4)}"
        self.kubectl.create(a_round(name))
        try:
            eventually(lambda: bool(self._reason(name)), timeout_seconds=STALLED_SECONDS_MAX)
        finally:
            self.kubectl("delete", "fround", name, "-n", HUB, "--timeout=60s")

    def _reason(self, name: str) -> str:
        status = self.kubectl.get("fround", name, "-n", HUB).get("status", {})
        return next(
            (c["reason"] for c in status["conditions"] if c["type"] == "Ready" and c["status"] != "Unknown"),
            "",
        )


def a_round(name: str) -> JsonObject:
    """One that selects nobody: its status says so as soon as anybody looks at it."""
    return {
        "apiVersion": API_VERSION,
        "kind": "FederatedRound",
        "metadata": {"name": name, "namespace": HUB},
        "spec": {
            "baseModel": {"uri": "s3://tributary/models/none", "digest": "sha256:" + "0" * 64},
            "clients": {"selector": {"matchLabels": {"suite": "none"}}},
            "method": {"lora": {}},
            "training": {"maxSteps": 2, "expectedBatchSize": 64, "learningRate": "1e-3"},
            "privacy": {"epsilon": "1", "delta": "1e-6"},
        },
    }


@pytest.fixture
def pair(
    installed: Kubectl, running: dev.Cluster, kubeconfig: Path, no_lease: None, tmp_path: Path
) -> Iterator[Pair]:
    s3, made = running.s3, []
    for identity in ("one", "other"):
        process = OperatorProcess(
            kubeconfig,
            tmp_path / f"{identity}.log",
            s3.endpoint_for_host,
            s3.access_key,
            s3.secret_key,
            identity=identity,
        )
        process.start()
        made.append(process)
    yield Pair(installed, *made)
    for process in made:
        print(process.log.read_text()[-8000:])
        if process.is_running:
            assert process.stop() == 0


def test_operators_hand_over_and_take_over(pair: Pair, installed: Kubectl) -> None:
    leader, other = pair.in_order()
    pair.tells_of_a_round()

    assert leader.stop() == 0
    assert pair.seconds_until_leads(other) <= 5
    pair.tells_of_a_round()

    leader.start()
    other.kill()
    assert pair.seconds_until_leads(leader) <= FAIL_OVER_SECONDS_MAX
    pair.tells_of_a_round()


def test_a_deposed_leader_stops_and_comes_back_in_the_same_process(pair: Pair, installed: Kubectl) -> None:
    leader, other = pair.in_order()
    assert other.stop() == 0
    taken = {"spec": {"holderIdentity": "a thief", "leaseDurationSeconds": 5}}
    installed("patch", "lease", names.LEASE, "-n", SYSTEM, "--type=merge", "-p", json.dumps(taken))
    eventually(lambda: pair.leader() is None)
    assert pair.seconds_until_leads(leader) <= 5 + FAIL_OVER_SECONDS_MAX
    pair.tells_of_a_round()
